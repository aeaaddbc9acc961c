"""Encode the parts of a folder on a pool of Ray Data actors. A part is a Parquet file; its vectors become a file of the
same name, whole or not at all, so that an interrupted job encodes again only the parts that lack one."""

from __future__ import annotations

import logging
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from adasid import config, errors, files
from adasid.distributed import settle
from adasid.encoders.base import Encoder, open_encoder
from adasid.files import Location
from adasid.storage import configure
from adasid.tables import VECTOR
from pipelines.engines import cluster

RAW = "raw"
"""Column of the text or picture in a part."""
ENCODED = pa.schema([("fingerprint", pa.string()), ("vector", VECTOR), ("reason", pa.string())])
_BATCHES = 16
"""A part is read so many of the encoder's batches at a time, or less:"""
_BYTES = 128 * 2**20
"""about so many bytes."""
_TRIES = 3
"""A part that ends so many actors ends the job, as Ray starts actors again without a limit."""
_BLOCKS = 32
"""Ray Data gets so many blocks of parts an actor."""


class Call(NamedTuple):
    """A call has what an actor needs: ``key``: of the encoder in errors; ``digest``: of its identity; ``todo`` and
    ``done``: folders of parts; ``fitted``: folder of tf-idf's state; ``root``: folder to which paths of pictures refer,
    ``roots``: other places from which they may be read; ``threads``: of torch; ``options``: of the object store."""

    key: str
    settings: config.Encoder
    digest: str
    todo: Location
    done: Location
    fitted: Location | None
    root: Location | None
    roots: tuple[str, ...]
    offline: bool
    threads: int
    options: dict[str, str]


class Progress(NamedTuple):
    """Progress counts encoded ``items``, and seconds of all actors: ``busy``, and of these inside the ``model``."""

    items: int = 0
    busy: float = 0.0
    model: float = 0.0

    @property
    def outside(self) -> float:
        """Return the share of the time that was not spent in the model."""
        return 1 - self.model / max(self.busy, 1e-9)


class EncodePart:
    """``EncodePart`` encodes parts on one actor, which loads the model once."""

    def __init__(self, call: Call) -> None:
        configure(call.options)
        settle(call.threads)
        _check_here(call)
        self.call, self.encoder = call, _opened(call)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Encode the part that the row names; return its figures. Raises InputError for a part that has ended
        :data:`_TRIES` actors."""
        name, started, before = str(row["part"]), time.monotonic(), self.encoder.seconds
        items, tries = 0, self.call.todo / f"{name}.tries"
        self._begin(tries)
        with (
            files.local(self.call.todo / name) as source,
            files.replacing(self.call.done / name) as draft,
            pq.ParquetFile(source) as file,
            pq.ParquetWriter(draft, ENCODED) as writer,
        ):
            for batch in _batches(file, self.call.settings.batch * _BATCHES):
                writer.write_batch(_encoded(self.encoder, batch))
                items += batch.num_rows
        tries.unlink(missing_ok=True)
        busy, model = time.monotonic() - started, self.encoder.seconds - before
        return {"part": name, "items": items, "busy": busy, "model": model}

    def _begin(self, tries: Location) -> None:
        begun = int(tries.read_text(encoding="utf-8")) if tries.exists() else 0
        if begun == _TRIES:
            raise errors.InputError(
                f"{self.call.key}: {tries.name.removesuffix('.tries')} ended its actor {_TRIES} times (out of memory, "
                f"or a content that a library does not survive): lower {self.call.key}.batch, max_bytes or max_pixels, "
                "or give the actors more memory; with a lower content.part_items fewer contents are in question"
            )
        files.write_text(tries, str(begun + 1))


def _batches(file: pq.ParquetFile, rows: int) -> Iterator[pa.RecordBatch]:
    """Yield at most ``rows`` rows at a time, fewer where a row group's pictures are large."""
    for group in range(file.num_row_groups):
        facts = file.metadata.row_group(group)
        fit = max(1, _BYTES * facts.num_rows // max(1, facts.total_byte_size))
        yield from file.iter_batches(min(rows, fit), row_groups=[group])


def _opened(call: Call) -> Encoder:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = open_encoder(
        call.key,
        call.settings,
        fitted=call.fitted,
        root=call.root,
        roots=call.roots,
        offline=call.offline,
        device=device,
    )
    if config.digest({"fields": list(call.settings.read), **encoder.identity}) != call.digest:
        raise errors.InputError(
            f"{call.key}.model: {call.settings.model} is another model on {socket.gethostname()} than on the driver's "
            "machine: give all machines the same files"
        )
    return encoder


def _check_here(call: Call) -> None:
    """Raise InputError where this machine does not see the folders of the driver's."""
    for folder, what in ((call.todo, "the run's folder"), (call.root, "the folder of pictures")):
        if isinstance(folder, Path) and not folder.is_dir():
            raise errors.InputError(
                f"{folder}: {what} is not there on {socket.gethostname()}: correct its place in the config, mount it "
                "on all machines under one path, or use object storage"
            )


def _encoded(encoder: Encoder, batch: pa.RecordBatch) -> pa.RecordBatch:
    vectors, reasons = encoder.encode(batch.column(RAW))
    lacks = np.array([reason is not None for reason in reasons], bool)
    lengths = np.where(lacks, 0, vectors.shape[1])
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    column = pa.ListArray.from_arrays(offsets, pa.array(vectors[~lacks].reshape(-1)), mask=pa.array(lacks))
    return pa.RecordBatch.from_arrays(
        [batch.column("fingerprint"), column, pa.array(reasons, pa.string())], schema=ENCODED
    )


def encode(call: Call, actors: int | None, settings: config.Ray) -> Iterator[Progress]:
    """Encode all parts of ``call.todo`` that ``call.done`` lacks; yield the progress after each. Raises the actors' own
    InputError, or TrainingError."""
    done = {path.name for path in call.done.glob("*.parquet")}
    parts = sorted(path.name for path in call.todo.glob("*.parquet") if path.name not in done)
    total = Progress()
    for row in _rows(call, parts, actors, settings) if parts else ():
        total = Progress(total.items + row["items"], total.busy + row["busy"], total.model + row["model"])
        yield total


def _rows(call: Call, parts: list[str], actors: int | None, settings: config.Ray) -> Iterator[dict[str, Any]]:
    if not settings.workers:
        worker = EncodePart(call)
        yield from (worker({"part": part}) for part in parts)
        return
    import ray

    cluster.join(settings)
    gpus = cluster.gpus_of(settings)
    number = min(actors or gpus or settings.workers, len(parts))
    blocks = min(len(parts), number * _BLOCKS)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        rows = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=blocks)
        encoded = rows.map(
            EncodePart,  # type: ignore[arg-type]
            fn_constructor_args=(call,),
            compute=ray.data.ActorPoolStrategy(size=number),
            num_cpus=settings.cpus_per_worker,
            num_gpus=1 if gpus else 0,
        )
        yield from encoded.iter_rows()
    except Exception as error:
        if found := re.search(r"adasid\.errors\.(\w+): ([^\n]+)", str(error)):
            raise getattr(errors, found.group(1))(found.group(2).strip()) from error
        raise cluster.failed(
            f"{call.key}: the encoding actors failed", "to go on with the parts that are left", error
        ) from error
