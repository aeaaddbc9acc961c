"""Export a generation for consumers that do not read Delta to ``<run>/exports/<generation>``, whole or not at all,
before it is live.

Rows are in the order of (item_index, item_id). ``sids`` (Parquet: item_id, codes, tokens) and ``items`` (Parquet: codes
and the items that have them, by collision rank); ``codes.npy`` [items, L] int32, with the ids of its rows in
``item_ids.txt``, one a line; ``index.json``, number of the row -> tokens, as LETTER, LC-Rec and Cornac read it;
``prefixes.safetensors``, the catalogue's prefixes (``adasid.recommenders.tokens.Prefixes``); ``changes`` (Parquet: the
generation's rows of ``sid_changes``). ``<run>/exports/live.json`` names the live generation and its folder.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pyspark.sql import functions as F
from safetensors.torch import save_file

from adasid.config import Config
from adasid.errors import InputError
from adasid.files import Location, local, remove, write_json
from adasid.recommenders.tokens import Prefixes
from adasid.sid import Slot
from adasid.tables import SID_CHANGES
from pipelines.engines import spark as engine
from pipelines.engines.lake import Lake
from pipelines.publish import generations
from pipelines.publish.generations import Generation
from pipelines.run import Run

_ROWS, _PREFIXES = 65_536, 20_000_000
"""Rows are written in batches of the first size; prefixes, which need all codes in memory, are written for at most the
second number of items."""
_LINE_BREAKS = r"[\n\r\x0b\x0c\x1c-\x1e\x{85}\x{2028}\x{2029}]"
"""These are the characters at which ``str.splitlines`` splits; readers of text differ in which of them end a line."""


def check(cfg: Config, lake: Lake, version: int) -> None:
    """Raise InputError where an id of ``item_features`` at ``version`` would shift the lines of ``item_ids.txt``.

    Call it before anything is written.
    """
    if "array" not in cfg.retokenize.exports:
        return
    for batch in lake.batches("item_features", version, ["item_id"]):
        ids = batch.column("item_id")
        broken = ids.filter(pc.match_substring_regex(ids, _LINE_BREAKS))
        if len(broken):
            raise InputError(
                f"item {broken[0].as_py()[:100]!r} of item_features version {version} has a line break in its id, "
                f"which would shift the lines of {Run(cfg).exports}/<generation>/item_ids.txt; nothing was published: "
                "rename it in the source and run jobs/ingest.py and jobs/build_features.py, or leave 'array' out of "
                "retokenize.exports"
            )


def point(cfg: Config, lake: Lake) -> None:
    """Write the live generation to ``live.json``; its ``folder`` is null where the exports were off, or were removed.

    Call it after the pointer has moved, and where it may have moved before an interrupted run ended.
    """
    written = None
    while written != (number := generations.pointer(lake)):  # another run may move the pointer meanwhile
        generation, written = generations.live(lake), number
        exported = _exported(Run(cfg).exports / str(number), generation)
        content = _columns(generation, "generation", "sids_version", "tokenizer")
        write_json(Run(cfg).exports / "live.json", {**content, "folder": str(number) if exported else None})


def _exported(folder: Location, generation: Generation) -> bool:
    """Return whether a folder is of this generation, not of one with its number in a lake that was removed."""
    manifest = folder / "manifest.json"
    if not manifest.exists():
        return False
    content = json.loads(manifest.read_text(encoding="utf-8"))
    columns = _columns(generation, "generation", "sids_version", "tokenizer", "items")
    return all(content.get(name) == value for name, value in columns.items())


def _columns(generation: Generation, *names: str) -> dict[str, Any]:
    """Return columns of a generation, in the order of ``names``."""
    return {name: getattr(generation, name) for name in names}


def write(
    cfg: Config,
    lake: Lake,
    slots: list[Slot],
    generation: Generation,
    allowed: Callable[[], None] = lambda: None,
) -> None:
    """Write the exports of ``generation`` that the config asks for. ``allowed``: is called before they replace a
    folder, and raises where this process may no longer publish."""
    wanted: set[str] = set(cfg.retokenize.exports)
    target = Run(cfg).exports / str(generation.generation)
    if generation.items > _PREFIXES:
        wanted -= {"prefixes"}
    if not wanted or _exported(target, generation):
        return
    columns = _columns(generation, "generation", "sids_version", "tokenizer", "items", "run_date", "policy")
    with _publishing(target, allowed) as (folder, draft):
        if wanted - {"changes"}:
            _table(cfg, lake, slots, generation, folder, draft, wanted)
        if "changes" in wanted and lake.exists("sid_changes"):
            _changes(lake, generation.generation, draft / "changes")
        write_json(draft / "manifest.json", {**columns, "slots": [slot._asdict() for slot in slots]})


@contextmanager
def _publishing(target: Location, allowed: Callable[[], None]) -> Iterator[tuple[Location, Path]]:
    """Yield the folder in which Spark writes and the local one of other files; at the end both are ``target``, of which
    ``manifest.json`` is the last file. ``allowed`` is called before a folder of this name is replaced."""
    if isinstance(target, Path):
        draft = target.with_name(f".{target.name}.draft")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        yield draft, draft
        allowed()
        shutil.rmtree(target, ignore_errors=True)
        draft.replace(target)
        return
    spark = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.draft")
    with tempfile.TemporaryDirectory(prefix="adasid-export-") as name:
        yield spark, Path(name)
        files = [path for path in Path(name).rglob("*") if path.is_file()]
        allowed()
        (target / "manifest.json").unlink(missing_ok=True)
        target.remove()
        for file in spark.files():
            file.copy(target / file.relative_to(spark).as_posix())
        allowed()
        for path in sorted(files, key=lambda path: path.name == "manifest.json"):
            (target / path.relative_to(name).as_posix()).upload(path)
        spark.remove()


def _table(
    cfg: Config,
    lake: Lake,
    slots: list[Slot],
    generation: Generation,
    folder: Location,
    draft: Path,
    wanted: set[str],
) -> None:
    """Write the exports of all rows: Spark's into ``folder``, others into ``draft``."""
    spark = engine.session(cfg.spark)
    features = engine.read(spark, lake, "item_features", generation.inputs["item_features"])
    index = features.select("item_id", "item_index")
    sids = (
        engine.read(spark, lake, "sids", generation.sids_version)
        .join(index, "item_id")
        .select("item_id", "item_index", "codes", "tokens", "collision_rank")
    )
    ordered = sids.repartitionByRange("item_index", "item_id").sortWithinPartitions("item_index", "item_id")
    ordered.drop("collision_rank", "item_index").write.parquet(engine.uri(folder / "sids"))
    if "parquet" in wanted:
        members = F.transform(
            F.array_sort(F.collect_list(F.struct("collision_rank", "item_id"))), lambda x: x["item_id"]
        )
        sids.groupBy("codes").agg(members.alias("items")).write.parquet(engine.uri(folder / "items"))
    with local(folder / "sids") as rows:
        if wanted & {"array", "prefixes"}:
            _array(rows, draft, generation.items, len(slots))
        if "index" in wanted:
            _index(rows, draft)
    if "prefixes" in wanted:
        _prefixes(draft, slots)
    if "parquet" not in wanted:
        remove(folder / "sids")
    for part in ("codes.npy", "item_ids.txt") if "array" not in wanted else ():
        (draft / part).unlink(missing_ok=True)


def _changes(lake: Lake, generation: int, target: Path) -> None:
    schema = pa.schema([field for field in SID_CHANGES if field.name != "generation"])
    parts = lake.batches("sid_changes", None, schema.names, pc.field("generation") == generation)
    ds.write_dataset((part.cast(schema) for part in parts), target, schema=schema, format="parquet")


def _batches(rows: Path) -> Iterator[pa.RecordBatch]:
    """Yield the exported rows, in order."""
    files = sorted(rows.glob("part-*.parquet"))
    yield from ds.dataset([str(file) for file in files], format="parquet").to_batches(batch_size=_ROWS)


def _array(rows: Path, draft: Path, items: int, length: int) -> None:
    codes = np.lib.format.open_memmap(draft / "codes.npy", mode="w+", dtype=np.int32, shape=(items, length))
    start = 0
    with (draft / "item_ids.txt").open("w", encoding="utf-8", newline="\n") as ids:
        for batch in _batches(rows):
            if batch.num_rows:
                codes[start : start + batch.num_rows] = (
                    batch.column("codes").flatten().to_numpy().reshape(batch.num_rows, length)
                )
                start += batch.num_rows
                ids.write(
                    pc.binary_join(pa.ListArray.from_arrays([0, batch.num_rows], batch.column("item_id")), "\n")[
                        0
                    ].as_py()
                    + "\n"
                )
    if start != items:
        raise InputError(
            f"generation has {items} items but {start} of them are in item_features: exports would lose the others; "
            "run jobs/build_features.py and publish again"
        )
    codes.flush()


def _index(rows: Path, draft: Path) -> None:
    """Write JSON by string operations on whole columns: no row is a Python object."""
    with (draft / "index.json").open("w", encoding="utf-8") as file:
        file.write("{")
        start = 0
        for batch in _batches(rows):
            if batch.num_rows:
                tokens = pc.binary_join(batch.column("tokens"), '", "')
                keys = pc.cast(pa.array(np.arange(start, start + batch.num_rows)), pa.string())
                entries = pc.binary_join_element_wise('"', keys, '": ["', tokens, '"]', "")
                file.write(
                    (",\n" if start else "")
                    + pc.binary_join(pa.ListArray.from_arrays([0, len(entries)], entries), ",\n")[0].as_py()
                )
                start += batch.num_rows
        file.write("}\n")


def _prefixes(draft: Path, slots: list[Slot]) -> None:
    codes = np.load(draft / "codes.npy", mmap_mode="r")
    prefixes = Prefixes.of_codes(codes, slots)
    tensors = {f"token.{level}": tokens for level, tokens in enumerate(prefixes.token)}
    tensors |= {f"first.{level}": first for level, first in enumerate(prefixes.first)}
    save_file({**tensors, "items": prefixes.items}, draft / "prefixes.safetensors")
