"""Encoders turn items' raw text and pictures into vectors. An item without content, or with content that cannot be
encoded, has no vector, and a reason why."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from adasid import config
from adasid.config.content import TF_IDF
from adasid.errors import InputError, first_line
from adasid.files import Location

Identity = dict[str, str | int | None]
"""Everything that an encoder's vectors depend on, as plain JSON."""

ABSENT = "absent"
"""Reason: the item has no content. This is no fault."""
NOT_FINITE = "not_finite"
"""Reason: the model's vector is zero, or has a value that is not finite."""


class Encoded(NamedTuple):
    """``vectors`` [n, width] float32, of norm 1, zeros where an item has none. ``reasons`` [n]: None where the item has
    a vector, else why it has none."""

    vectors: NDArray[np.float32]
    reasons: list[str | None]


class Encoder(Protocol):
    """An encoder of one modality. ``width``: of its vectors. ``identity``: of the model and the settings; two encoders
    of one identity give equal vectors."""

    width: int
    identity: Identity

    @property
    def seconds(self) -> float:
        """Return the time inside the model so far, without reading and preparation."""
        ...

    def encode(self, rows: pa.Array) -> Encoded:
        """Encode n items: texts, or pictures as :func:`adasid.encoders.places.places` describes them. Raises InputError
        for a column of another type."""
        ...


def open_encoder(
    key: str,
    settings: config.Encoder,
    *,
    fitted: Location | None,
    root: Location | None,
    roots: Sequence[str] = (),
    offline: bool,
    device: torch.device,
) -> Encoder:
    """Load an encoder. ``key``: its place in the configuration, such as content.encoders.text, with which errors begin.
    ``fitted``: folder with the state of tf-idf. ``root``: folder of relative paths to pictures; ``roots``: further
    places from which pictures may be read. ``offline``: the model is a local folder, or lies in the hub's local cache.

    Raises InputError for a model that does not exist, has no weights as safetensors, or is narrower than
    ``settings.width``, and for a missing package.
    """
    from adasid.encoders.text import SentenceEncoder
    from adasid.encoders.tfidf import TfIdfEncoder
    from adasid.encoders.vision import ImageEncoder

    if settings.model == TF_IDF:
        return TfIdfEncoder(key, settings, fitted, device)
    if settings.field:
        return ImageEncoder(key, settings, root, offline, device, roots)
    return SentenceEncoder(key, settings, offline, device)


def identity_of(key: str, settings: config.Encoder, *, fitted: Location | None, offline: bool) -> Identity:
    """Return the identity of the encoder that :func:`open_encoder` loads, without loading its weights.

    Raises InputError as :func:`open_encoder` does for a model that does not exist.
    """
    from adasid.encoders import hub, tfidf

    if settings.model == TF_IDF:
        return tfidf.identity(settings, tfidf.read(key, settings, fitted))
    return hub.identity(settings, hub.find(key, settings, offline))


def needed(key: str, package: str) -> Any:
    """Import a package of the extra ``content``. Raises InputError if it is missing."""
    try:
        return import_module(package)
    except ImportError as error:
        raise InputError(
            f"{key}: the package {package.partition('.')[0]} cannot be imported ({first_line(error)}): install "
            "adasid[content]"
        ) from None


def checked_width(key: str, settings: config.Encoder, width: int) -> int:
    """Return the width of the vectors of a model of ``width``. Raises InputError if ``settings.width`` is larger."""
    if settings.width and settings.width > width:
        raise InputError(
            f"{key}.width: {settings.width} is more than the {width} values of {settings.model}: set at most {width}, "
            "or null"
        )
    return settings.width or width


def encoded(outputs: Tensor, rows: NDArray[np.int64], reasons: list[str | None], width: int) -> Encoded:
    """Return the result for all items from a model's ``outputs`` [m, at least width] for the items ``rows`` [m]: the
    first ``width`` values, scaled to norm 1. ``reasons`` [n]: why the other items have no vector."""
    vectors = np.zeros((len(reasons), width), np.float32)
    cut = outputs[:, :width].float().cpu()
    norms = torch.linalg.vector_norm(cut, dim=1)
    fine = (torch.isfinite(norms) & (norms > 0)).numpy()
    vectors[rows[fine]] = (cut / norms[:, None]).numpy()[fine]
    reasons = list(reasons)
    for row in rows[~fine]:
        reasons[row] = NOT_FINITE
    return Encoded(vectors, reasons)


class Clock:
    """A clock sums the seconds inside a model's forward pass; on a GPU it waits for the result."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.seconds = self._start = 0.0
        self._device = device
        model.register_forward_pre_hook(self._before)
        model.register_forward_hook(self._after)

    def _before(self, *_: object) -> None:
        self._start = time.perf_counter()

    def _after(self, *_: object) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds += time.perf_counter() - self._start
