"""What a training stage sends to its workers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from adasid.config import Config
from adasid.files import Location
from adasid.sid import Slot
from adasid.tokenizers.artifact import Manifest, settings_of

Task = Literal["retrieval", "ranking"]


class Catalogue(BaseModel):
    """A catalogue gives the SIDs that a downstream model reads: ``table`` and ``version``, and the ``slots`` of their
    tokenizer, which are ``parallel`` (independent of each other) or residual."""

    model_config = ConfigDict(frozen=True)

    table: str
    version: int
    slots: tuple[Slot, ...]
    parallel: bool = False

    @staticmethod
    def of(table: str, version: int, manifest: Manifest) -> Catalogue:
        """Return the SIDs that the tokenizer of ``manifest`` wrote."""
        parallel = settings_of(manifest.config).parallel
        return Catalogue(table=table, version=version, slots=manifest.slots, parallel=parallel)


class PreviousTable(BaseModel):
    """A ``version`` of the table ``previous_codes``: the kind and size of each slot of its codes, and the tolerance
    ``slack`` within which training preserves them."""

    model_config = ConfigDict(frozen=True)

    version: int
    slots: tuple[tuple[str, int], ...]
    slack: float


class Payload(BaseModel):
    """A payload tells a worker what to train: the ``config``, the root of the ``lake``, the versions of the tables to
    ``read``, the ``folder`` of the result and the ``library_versions`` for its record.

    ``catalogue``: the SIDs of a downstream model, None: one token an item; ``start``: the artifact from which a
    tokenizer continues; ``previous``: previous codes that it preserves; ``encoders``: modality -> digest of the encoder
    of its vectors, for the tokenizer's manifest."""

    model_config = ConfigDict(frozen=True)

    config: Config
    lake: str
    read: dict[str, int]
    folder: Location
    library_versions: dict[str, str]
    catalogue: Catalogue | None = None
    encoders: dict[str, str] = {}
    start: Location | None = None
    previous: PreviousTable | None = None
