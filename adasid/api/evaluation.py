"""Measure semantic IDs: code usage, collisions, and how much the codes say about the vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from numpy.typing import ArrayLike, NDArray

from adasid.api.encoding import SemanticIds
from adasid.api.items import Data, Items
from adasid.config import Compare
from adasid.errors import InputError
from adasid.metrics.codes import code_use, group_metrics
from adasid.metrics.probes import Readout, duplicates_kept, shared_cosine
from adasid.tables import BEHAVIOR, PAD

_CALLER = "adasid.evaluate_codes"
_ROWS = 1024
_READOUT = 8 << 30
"""Largest size of the regression of vectors on codes, in bytes."""


@dataclass(frozen=True)
class CodeMetrics:
    """A ``CodeMetrics`` contains the metrics of the semantic IDs of M items in L slots of K codes each.

    ``items``: M; ``distinct``: number of different SIDs; ``largest_group``: most items that share one SID.
    ``collision_items``: share of items whose SID is not unique; ``collision_distinct``: (M - distinct) / M.
    ``sid_entropy``: entropy of whole SIDs in nats, at most ln M.
    ``utilisation`` [L]: share of the K codes that items have; ``entropy`` [L] in nats, at most ln K; ``perplexity``
    [L]: exp(entropy); ``top1`` [L]: share of the most frequent code; ``pad`` [L]: share of items without a code. The
    first four leave PAD out; None for a slot that no item fills.
    ``readout``: modality -> fraction of variance that a linear readout of the codes leaves unexplained, on every fifth
    item, fitted on the others; 1 is no better than the mean, None where too few items have the modality.
    ``shared_cosine``: mean cosine of the content of items that share a SID; None where no two do.
    ``duplicates_kept``: share of near-duplicates in content (cosine of at least 0.95) that share a SID; None without.
    """

    items: int
    distinct: int
    largest_group: int
    collision_items: float
    collision_distinct: float
    sid_entropy: float
    utilisation: tuple[float, ...]
    entropy: tuple[float | None, ...]
    perplexity: tuple[float | None, ...]
    top1: tuple[float | None, ...]
    pad: tuple[float, ...]
    readout: dict[str, float | None]
    shared_cosine: float | None
    duplicates_kept: float | None


def evaluate_codes(
    codes: SemanticIds | ArrayLike,
    vectors: Data | ArrayLike | None = None,
    *,
    codebook_size: int | None = None,
    sample: int = 50_000,
    queries: int = 2_000,
) -> CodeMetrics:
    """Measure semantic IDs.

    ``codes``: the result of :meth:`SidTokenizer.encode`, or integers [n, L] (NumPy or torch) where -1 is PAD.
    ``vectors``: the items' vectors, in any form that ``encode`` takes, or one matrix [n, D]; row i belongs to row i of
    ``codes``. Without them the last three metrics are empty.
    ``codebook_size``: K, for integers alone; None: the largest code + 1.
    ``sample``: items, evenly spaced, that the metrics on vectors use; ``queries``: of these, items whose
    near-duplicates are searched for.

    An inactive slot counts as PAD in ``readout``, as in ``jobs/compare_tokenizers.py``; all other metrics use the codes
    as given. Raises InputError for shapes that do not fit.
    """
    emitted, active, sizes = _codes(codes, codebook_size)
    n = len(emitted)
    _, counts = np.unique(emitted, axis=0, return_counts=True)
    whole = group_metrics(*np.unique(counts, return_counts=True))
    use = [code_use(np.bincount(row[row != PAD], minlength=size)) for row, size in zip(emitted.T, sizes)]
    probes = _probes(emitted, active, max(sizes), vectors, sample, queries) if vectors is not None else {}
    return CodeMetrics(
        **{name: whole[name] for name in ("items", "distinct", "largest_group")},
        **{name: whole[name] for name in ("collision_items", "collision_distinct", "sid_entropy")},
        utilisation=tuple(u.utilisation for u in use),
        entropy=tuple(u.entropy for u in use),
        perplexity=tuple(u.perplexity for u in use),
        top1=tuple(u.top1 for u in use),
        pad=tuple(float(share) for share in (emitted == PAD).sum(0) / n),
        readout={name.removeprefix("readout_"): value for name, value in probes.items() if name.startswith("readout_")},
        shared_cosine=probes.get("shared_cosine"),
        duplicates_kept=probes.get("duplicates_kept"),
    )


def _codes(codes: Any, size: int | None) -> tuple[NDArray[np.int64], NDArray[np.bool_], list[int]]:
    """Return the codes [n, L], whether each is active [n, L], and the codebook size of each slot [L]."""
    if isinstance(codes, SemanticIds):
        if size is not None:
            raise InputError(f"{_CALLER}: codebook_size is {size}, but SemanticIds know theirs; leave it out")
        emitted, active, sizes = codes.codes, codes.active, [slot.size for slot in codes.slots]
    else:
        emitted = np.asarray(codes.cpu() if isinstance(codes, torch.Tensor) else codes)
        if emitted.ndim != 2 or emitted.dtype.kind not in "iu" or not emitted.shape[1]:
            raise InputError(f"{_CALLER}: codes are {emitted.dtype} of shape {emitted.shape}; pass integers [n, L]")
        least = int(emitted.max(initial=0)) + 1
        if emitted.min(initial=0) < PAD or (size is not None and size < least):
            span = f"{emitted.min(initial=0)} to {least - 1}"
            raise InputError(f"{_CALLER}: codes run from {span}; they must be {PAD} (PAD) or 0 to codebook_size - 1")
        active, sizes = emitted != PAD, [size or least] * emitted.shape[1]
    if not len(emitted):
        raise InputError(f"{_CALLER}: codes have no rows; pass at least one item")
    return emitted.astype(np.int64), active, sizes


def _probes(
    emitted: NDArray[np.int64],
    active: NDArray[np.bool_],
    size: int,
    vectors: Any,
    sample: int,
    queries: int,
) -> dict[str, float | None]:
    """Compute the metrics that compare codes with vectors, as ``jobs/compare_tokenizers.py`` defines them."""
    plain = isinstance(vectors, Mapping) or hasattr(vectors, "__arrow_c_stream__")
    items = Items.of(vectors if plain else {"vectors": vectors}, _CALLER)
    n = len(emitted)
    if items.n != n:
        raise InputError(f"{_CALLER}: vectors have {items.n} rows, codes have {n}; row i of both must be the same item")
    if sample < 1 or queries < 0:
        raise InputError(f"{_CALLER}: sample is {sample} and queries {queries}; pass at least 1 and 0")
    widths, step = items.widths(items.columns, _CALLER), -(-n // sample)
    needed = Readout.bytes(emitted.shape[1], size, widths)
    if needed > _READOUT:
        raise InputError(
            f"{_CALLER}: the regression of {len(widths)} modalities on {emitted.shape[1]} slots of {size} codes takes "
            f"{needed / 2**30:.0f} GiB, more than {_READOUT >> 30}; leave vectors out"
        )
    content = [m for m in widths if m != BEHAVIOR] or list(widths)
    readout, parts = Readout(emitted.shape[1], size, widths), []
    for start in range(0, n, _ROWS * step):
        rows = np.arange(start, min(start + _ROWS * step, n), step)
        batch = items.batch(start, rows[-1] + 1, widths)
        taken = torch.from_numpy(rows - start)
        some = {m: values[taken] for m, values in batch.vectors.items()}
        codes = torch.from_numpy(np.where(active[rows], emitted[rows], PAD))
        present = {m: values[taken] for m, values in batch.present.items()}
        readout.add(codes, torch.from_numpy(rows // step), some, present)
        joint = torch.cat([nnf.normalize(some[m], dim=1) for m in content], 1)
        parts.append(nnf.normalize(joint, dim=1).numpy())
    unit, chosen = np.concatenate(parts), emitted[::step].astype(np.int32)
    asked = np.unique(np.linspace(0, len(unit) - 1, min(queries, len(unit))).round().astype(np.int64))
    probes = {f"readout_{m}": value for m, value in readout.unexplained().items()}
    probes["shared_cosine"] = shared_cosine(chosen, unit)
    probes["duplicates_kept"] = duplicates_kept(chosen, unit, asked, Compare().near_duplicate)
    return {name: value if np.isfinite(value) else None for name, value in probes.items()}
