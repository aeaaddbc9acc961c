"""Encode pictures with a vision or CLIP-like model of transformers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from adasid import config
from adasid.encoders import hub, images, places
from adasid.encoders.base import Clock, Encoded, checked_width, encoded, needed
from adasid.errors import InputError, first_line
from adasid.faults import wrapped
from adasid.files import Location

_THREADS = 8
Prepared = dict[str, Tensor] | str
"""The model's inputs for one picture, or the reason why there are none."""


class Features(nn.Module):
    """The vectors of pictures by a model: its ``get_image_features`` if it has that, as CLIP and SigLIP do; else its
    pooled output, if the weights have a pooler; else the mean of its last hidden state."""

    def __init__(self, model: nn.Module, pooled: bool) -> None:
        super().__init__()
        self.model: Any = model
        self._pooled = pooled

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return vectors [n, width]."""
        if hasattr(self.model, "get_image_features"):
            outputs = self.model.get_image_features(**inputs)
            return (outputs if isinstance(outputs, Tensor) else outputs.pooler_output).flatten(1)
        outputs = self.model(**inputs)
        pooled = getattr(outputs, "pooler_output", None)
        if self._pooled and pooled is not None:
            return pooled.flatten(1)  # type: ignore[no-any-return]  # [n, width, 1, 1] of convolutional models
        hidden = outputs.last_hidden_state  # [n, patches, width], or [n, width, height, width of the map]
        return hidden.mean(1) if hidden.ndim == 3 else hidden.flatten(2).mean(2)  # type: ignore[no-any-return]


class ImageEncoder:
    """An encoder of pictures with a model of transformers, in float32. Threads read, decode and resize the pictures of
    the next batch while the model runs."""

    def __init__(
        self,
        key: str,
        settings: config.Encoder,
        root: Location | None,
        offline: bool,
        device: torch.device,
        roots: Sequence[str] = (),
    ) -> None:
        """Load the model. Raises InputError as :func:`adasid.encoders.base.open_encoder` does."""
        library = needed(key, "transformers")
        needed(key, "PIL.Image")
        origin = hub.find(key, settings, offline)
        folder = hub.fetch(key, settings, origin, offline)
        only = {"local_files_only": True, "trust_remote_code": False}
        try:
            # torchvision resizes otherwise than Pillow: with one of them, vectors are equal on all machines
            self._processor = library.AutoImageProcessor.from_pretrained(folder, backend="pil", **only)
            model, loading = library.AutoModel.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **only
            )
            missing = sorted(loading["missing_keys"])
            self._features = Features(model, not any("pooler" in name for name in missing)).eval().to(device)
            self._settings, self._device = settings, device
            self._rules = places.Rules(settings.max_bytes, root, tuple(roots), settings.web)
            width = int(self._forward([self._inputs(needed(key, "PIL.Image").new("RGB", (64, 64)))]).shape[1])
        except Exception as error:
            raise wrapped(
                error,
                f"{key}.model: {settings.model} cannot be loaded as a vision model of transformers "
                f"({first_line(error)}): name another model",
            ) from error
        if lacking := [name for name in missing if "pooler" not in name]:
            raise InputError(
                f"{key}.model: {settings.model} has no weights for {lacking[0]} and {len(lacking) - 1} others: name "
                "another model"
            )
        self.width = checked_width(key, settings, width)
        self.identity = hub.identity(settings, origin)
        self._side = _side(self._processor)
        self._clock = Clock(self._features, device)

    @property
    def seconds(self) -> float:
        """Return the time inside the model so far."""
        return self._clock.seconds

    def encode(self, rows: pa.Array) -> Encoded:
        """Encode pictures [n]; their types are those of :func:`adasid.encoders.places.places`."""
        size, outputs, reasons = self._settings.batch, [torch.zeros(0, self.width)], list[str | None]()
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
            ahead = self._submitted(pool, rows.slice(0, size))
            for start in range(size, len(rows) + size, size):
                current, ahead = ahead, self._submitted(pool, rows.slice(start, size))
                prepared = [future.result() for future in current]
                reasons += [part if isinstance(part, str) else None for part in prepared]
                if inputs := [part for part in prepared if not isinstance(part, str)]:
                    outputs.append(self._forward(inputs)[:, : self.width].cpu())
        given = np.array([row for row, reason in enumerate(reasons) if reason is None], np.int64)
        return encoded(torch.cat(outputs), given, reasons, self.width)

    def _submitted(self, pool: ThreadPoolExecutor, rows: pa.Array) -> list[Future[Prepared]]:
        return [pool.submit(self._prepared, place) for place in places.places(rows)]

    def _prepared(self, place: places.Place) -> Prepared:
        settings = self._settings
        data = places.read(place, self._rules)
        if isinstance(data, str):
            return data
        picture = images.decode(data, settings.max_bytes, settings.max_pixels, self._side)
        return picture if isinstance(picture, str) else self._inputs(picture)

    def _inputs(self, picture: Any) -> dict[str, Tensor]:
        return dict(self._processor(images=[picture], return_tensors="pt"))

    @torch.inference_mode()
    def _forward(self, inputs: list[dict[str, Tensor]]) -> Tensor:
        batch = {name: torch.cat([part[name] for part in inputs]).to(self._device) for name in inputs[0]}
        return self._features(batch)  # type: ignore[no-any-return]


def _side(processor: Any) -> int:
    """Return twice the largest side that the processor resizes to, 0 where it does not say."""
    size = getattr(processor, "size", None) or {}
    return 2 * max((value for value in dict(size).values() if isinstance(value, int)), default=0)
