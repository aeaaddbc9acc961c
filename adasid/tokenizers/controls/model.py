"""Controls have codes that carry no information about the item, unique or random. A method's gain over them measures
what its codes mean."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from adasid.data.shards import Batch, Shard
from adasid.distributed import Workers
from adasid.errors import InputError
from adasid.sid import Codes, slots_of
from adasid.tokenizers.base import Tokenizer
from adasid.tokenizers.controls import ItemIdSettings, RandomSidSettings

_ROUNDS = 2
_GAMMA = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


class _Control(Tokenizer):
    """A control reads no vectors, so it cannot decode any."""

    def __init__(self, settings: ItemIdSettings | RandomSidSettings, letter: str) -> None:
        slots = slots_of({"shared": settings.levels}, settings.codebook_size, {"shared": letter})
        super().__init__(settings, {}, slots)

    def prepare(self, shard: Shard, workers: Workers) -> None:
        """Do nothing: a control does not depend on the data."""

    @torch.inference_mode()
    def reconstruct(self, batch: Batch) -> dict[str, Tensor]:
        """Return no modality."""
        return {}


class ItemId(_Control):
    """``ItemId`` encodes the item's index in base K, its digits permuted without loss, in slots i0 to i{L-1}.
    ``widths`` is not read.

    The index is a rank by popularity, so its leading digits alone would reveal how popular an item is. Two rounds of a
    Feistel network over the digits (each is shifted by a hash of the others) make every digit uniform and keep the
    codes unique.
    """

    settings: ItemIdSettings

    def __init__(self, settings: ItemIdSettings, widths: Mapping[str, int]) -> None:
        super().__init__(settings, "i")
        powers = [min(settings.codebook_size**digit, 2**62) for digit in reversed(range(settings.levels))]
        self.register_buffer("powers", torch.tensor(powers))

    def prepare(self, shard: Shard, workers: Workers) -> None:
        """Check the catalogue's size. Raises InputError if it has more items than there are codes."""
        self._check(
            int(workers.gather(torch.tensor([shard.item_index[-1]], device=self.get_buffer("powers").device)).max()),
        )

    def _check(self, largest: int) -> None:
        s = self.settings
        if largest >= s.codebook_size**s.levels:
            raise InputError(
                f"tokenizer item-id: item_index {largest} does not fit tokenizer.codebook_size {s.codebook_size} "
                f"to the power of tokenizer.levels {s.levels} = {s.codebook_size**s.levels}: raise tokenizer.levels"
            )

    @torch.inference_mode()
    def encode(self, batch: Batch) -> Codes:
        """Encode the index. Raises InputError for an index that does not fit."""
        if len(batch):
            self._check(int(batch.index.max()))
        powers, size = self.get_buffer("powers"), self.settings.codebook_size
        digits = batch.index[:, None] // powers % size
        for step in range(_ROUNDS * len(powers)):
            digit = step % len(powers)
            others = (digits * powers).sum(1) - digits[:, digit] * powers[digit]
            shift = _splitmix(torch.full_like(others, step), others.bitwise_and(2**62 - 1))
            digits[:, digit] = (digits[:, digit] + _shift(shift, 1)) % size
        return _whole(digits)


class RandomSid(_Control):
    """``RandomSid`` draws codes uniformly by a hash of salt, slot and item index, in slots x0 to x{L-1}. ``widths`` is
    not read.

    The salt comes from torch's generator at construction, that is, from the run's seed.
    """

    settings: RandomSidSettings

    def __init__(self, settings: RandomSidSettings, widths: Mapping[str, int]) -> None:
        super().__init__(settings, "x")
        self.register_buffer("salt", torch.randint(-(2**63), 2**63 - 1, ()))

    @torch.inference_mode()
    def encode(self, batch: Batch) -> Codes:
        """Take each slot's code from a splitmix64 stream at the item's index; the streams' seeds come from the stream
        of the salt."""
        salt = self.get_buffer("salt")
        seeds = _splitmix(salt, torch.arange(self.settings.levels, device=salt.device))
        return _whole(_shift(_splitmix(seeds, batch.index[:, None]), 1) % self.settings.codebook_size)


def _whole(codes: Tensor) -> Codes:
    return Codes(codes.int(), torch.ones_like(codes, dtype=torch.float32), torch.ones_like(codes, dtype=torch.bool))


def _splitmix(seed: Tensor, index: Tensor) -> Tensor:
    """Return value ``index`` >= 0 of the splitmix64 stream of ``seed`` (Steele, Lea and Flood, OOPSLA 2014), in int64
    that wraps around."""
    z = seed + (index + 1) * _signed(_GAMMA)
    for bits, factor in _MIX:
        z = (z ^ _shift(z, bits)) * _signed(factor)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Shift right logically."""
    return (z >> bits).bitwise_and(2 ** (64 - bits) - 1)


def _signed(value: int) -> int:
    """Return the int64 with the bits of a 64-bit unsigned number."""
    return value - 2**64 if value >= 2**63 else value
