"""Copy the source into the Delta tables ``items`` and ``interactions`` (and ``truth`` where it is known), unchecked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from adasid import tables
from adasid.config import ArraysSource, Config
from adasid.config.content import AMAZON_TEXTS
from adasid.config.names import is_table_name
from adasid.datasets import arrays, synthetic
from adasid.datasets.arrow import over_ranges
from adasid.errors import InputError
from adasid.faults import wrapped
from adasid.files import location
from pipelines import stage
from pipelines.engines import catalog
from pipelines.engines import spark as engine
from pipelines.engines.lake import Lake
from pipelines.engines.tracking import StageContext
from pipelines.sources import amazon, folder, in_place, parquet
from pipelines.sources.fingerprint import fingerprint
from pipelines.sources.in_place import Reference
from pipelines.stage import Inputs, Stage

_FORMAT = 2
"""Bump when a table gets a column, so that tables are written again."""

_TABLES = ("items", "interactions")
_CHUNK, _TASKS = 10_000, 256
"""A task generates at least this many items; at most this many tasks generate items."""


def run(cfg: Config, context: StageContext) -> None:
    """Write ``items``, ``interactions`` and, for the synthetic source, ``truth``; unparsable lines of Amazon files go
    to ``rejected_rows``.

    Nothing is written where the tables already come from the same settings and the same source files (see
    ``fingerprint``). Raises InputError for a missing or unreadable file, column or modality.
    """
    if stage.run(INGEST, cfg, context) is None:
        context.status = "up to date"


def _writes(cfg: Config) -> tuple[str, ...]:
    return ("items", "interactions", *(("truth",) if cfg.source.kind == "synthetic" else ()))


def _settings(cfg: Config, lake: Lake) -> dict[str, object]:
    return {
        "format": _FORMAT,
        "source": _source(cfg),
        "seed": cfg.seed if cfg.source.kind == "synthetic" else None,
        "modalities": modalities_of(cfg),
        **({"raw_fields": raw} if any(raw := raw_of(cfg)) else {}),
        "files": {key: fingerprint(cfg, key, path, form) for key, (path, form) in inputs_of(cfg).items()},
    }


def _source(cfg: Config) -> dict[str, object]:
    """Return what counts of the source: not where tables stay, which changes no row, nor a kind that is not used, which
    earlier versions did not know."""
    source = cfg.source.model_dump(mode="json", exclude={"tables": {"in_place"}})
    return source if cfg.source.folder else {name: value for name, value in source.items() if name != "folder"}


def _build(inputs: Inputs, context: StageContext) -> dict[str, int]:
    cfg, lake, spark = inputs.cfg, inputs.lake, engine.session(inputs.cfg.spark)
    modalities, names = modalities_of(cfg), _writes(cfg)
    newest = Lake(lake.root, {})
    before = {name: newest.version(name) if newest.exists(name) else None for name in names}
    versions, facts = dict[str, int](), dict[str, int]()
    try:
        with _reading(cfg):
            for name, (at, frame) in _in_place(spark, cfg, modalities, inputs, context.note).items():
                facts[name] = frame.count()  # converts every row whose columns have other types than the lake's
                versions[name] = in_place.write(lake, name, at, inputs.hash)
                context.note(f"{name} stays at {at.location}, version {at.version}")
            for name, frame in _frames(spark, cfg, modalities, inputs, context.note).items():
                schema = {
                    "items": tables.items(modalities, *raw_of(cfg)),
                    "interactions": tables.INTERACTIONS,
                    "truth": tables.TRUTH,
                    "rejected_rows": tables.REJECTED_ROWS,
                }[name]
                added = f"input_hash = '{inputs.hash}'" if name == "rejected_rows" else None
                versions[name] = engine.write(frame, lake, name, schema, inputs.hash, replace=added)
                context.note(f"{name} written at version {versions[name]}")
    except BaseException:
        _undo(context, before, versions)
        raise
    for name in ("items", "interactions"):
        if name not in facts:
            facts[name] = lake.open(name, versions[name]).to_pyarrow_dataset().count_rows()
    if "rejected_rows" in versions:
        refused = engine.read(spark, lake, "rejected_rows", versions["rejected_rows"])
        refused = refused.filter(F.col("input_hash") == inputs.hash)
        facts["unparsable_lines"] = refused.agg(F.coalesce(F.sum("copies"), F.lit(0))).first()[0]  # type: ignore[index]
    context.facts.update(facts)
    context.metrics(facts)
    return versions


def _undo(context: StageContext, before: Mapping[str, int | None], written: Mapping[str, int]) -> None:
    """Restore tables that were already replaced when another one could not be read."""
    for name in written:
        if name in before:
            context.lake.restore(name, before[name])
            context.note(f"{name} is as it was before: not all tables of the source could be read")


def modalities_of(cfg: Config) -> tuple[str, ...]:
    """Return the vector columns of ``items``. Raises InputError where the source lacks one."""
    wanted, source = cfg.brought, cfg.source
    offered = {
        "synthetic": synthetic.MODALITIES,
        "amazon": (),
        "folder": (),
        "arrays": tuple(source.arrays.embeddings) if source.arrays else (),
        "tables": wanted,
    }[source.kind]
    for modality in wanted:
        if modality not in offered:
            fix = (
                "add it to source.arrays.embeddings"
                if source.kind == "arrays"
                else "encode it (content.encoders), or bring your own vectors with source.kind: arrays or tables"
            )
            use = (
                "set behavior.source: sasrec"
                if modality == tables.BEHAVIOR
                else f"remove it from features.content ({', '.join(cfg.features.content)})"
            )
            raise InputError(
                f"source.kind {source.kind!r} has no modality {modality!r} (it has: {', '.join(offered) or 'none'}): "
                f"{use}, or {fix}"
            )
    return wanted


def raw_of(cfg: Config) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the raw fields of ``items`` that encoders read: of text, and pictures. Raises InputError for a field that
    the source lacks."""
    texts, pictures = cfg.content.raw()
    offered = {
        "synthetic": ("title",),
        "arrays": ("title",),
        "amazon": (*AMAZON_TEXTS, amazon.PICTURE),
        "tables": (*texts, *pictures),
        "folder": (*texts, *pictures),
    }[cfg.source.kind]
    if lacks := next((name for name in (*texts, *pictures) if name not in offered), None):
        raise InputError(
            f"content.encoders reads {lacks!r}, but source.kind {cfg.source.kind!r} has the raw fields "
            f"{', '.join(offered)}: name one of these, or bring yours with source.kind: tables or folder"
        )
    return texts, pictures


def inputs_of(cfg: Config) -> dict[str, tuple[str, str]]:
    """Map each config key to the (absolute path, URL or name, format) that the source reads; the format of a name is
    ``table``."""
    source = cfg.source
    sources: dict[str, tuple[str, str]] = {}
    if source.tables:
        named = {name: getattr(source.tables, name) for name in _TABLES}
        sources = {
            f"source.tables.{name}": (value, "table" if is_table_name(value) else source.tables.format)
            for name, value in named.items()
        }
    elif source.arrays:
        files = {"items": source.arrays.items, "interactions": source.arrays.interactions}
        files.update({f"embeddings.{modality}": source.arrays.embeddings[modality] for modality in modalities_of(cfg)})
        sources = {
            f"source.arrays.{name}": (str(Path(source.arrays.folder) / file), "file") for name, file in files.items()
        }
    elif source.amazon:
        sources = {f"source.amazon.{name}": (getattr(source.amazon, name), "file") for name in ("reviews", "metadata")}
    elif source.folder:
        named = {name: str(location(source.folder.folder) / getattr(source.folder, name)) for name in _TABLES}
        sources = {f"source.folder.{name}": (path, folder.form(path)) for name, path in named.items()}
    as_given = {key for key, (path, form) in sources.items() if form == "table" or "://" in path}
    return {
        key: (path if key in as_given else str(Path(path).absolute()), form) for key, (path, form) in sources.items()
    }


def _frames(
    spark: SparkSession,
    cfg: Config,
    modalities: tuple[str, ...],
    inputs: Inputs,
    note: Callable[[str], None],
) -> dict[str, DataFrame]:
    prints = cast(dict[str, list[Any]], inputs.settings["files"])
    read = inputs_of(cfg)
    paths = {key.rsplit(".", 1)[-1]: path for key, (path, _) in read.items()}
    if cfg.source.synthetic:
        params, make = cfg.source.synthetic, (cfg.source.synthetic, cfg.seed)
        return {
            "items": _generate(
                spark,
                params.items,
                _chunk(params.items),
                partial(synthetic.items, *make, modalities),
                tables.items(modalities),
            ),
            "truth": _generate(
                spark, params.items, _chunk(params.items), partial(synthetic.truth, *make), tables.TRUTH
            ),
            "interactions": _generate(
                spark, params.users, params.chunk_users, partial(synthetic.interactions, *make), tables.INTERACTIONS
            ),
        }
    if cfg.source.tables:
        return {
            name: parquet.table(spark, key, *read[key], prints[key], target, note)
            for name, target in _targets(cfg, modalities).items()
            for key in (f"source.tables.{name}",)
            if name not in cfg.source.tables.in_place
        }
    if cfg.source.arrays:
        return _from_arrays(spark, cfg.source.arrays, paths, modalities, note)
    if cfg.source.folder:
        return {
            name: folder.table(spark, cfg.source.folder, f"source.folder.{name}", paths[name], target, note)
            for name, target in _targets(cfg, modalities).items()
        }
    assert cfg.source.amazon
    return amazon.read(spark, cfg.source.amazon, paths, raw_of(cfg), inputs.hash)


def _targets(cfg: Config, modalities: tuple[str, ...]) -> dict[str, parquet.Target]:
    return {"items": parquet.items(modalities, *raw_of(cfg)), "interactions": parquet.EVENTS}


def _in_place(
    spark: SparkSession, cfg: Config, modalities: tuple[str, ...], inputs: Inputs, note: Callable[[str], None]
) -> dict[str, tuple[Reference, DataFrame]]:
    """Return where the tables are that stay at their source, and their rows. Raises InputError for a table of the
    catalogue that is no Delta table."""
    result, prints = dict[str, tuple[Reference, DataFrame]](), cast(dict[str, list[Any]], inputs.settings["files"])
    for name in cfg.source.tables.in_place if cfg.source.tables else ():
        key = f"source.tables.{name}"
        path, form = inputs_of(cfg)[key]
        if form == "table":
            entry = catalog.source(spark, key, path)
            if entry.provider != "delta":
                raise InputError(
                    f"{key} {path}: is a {entry.provider} table; only Delta tables can be read in place: take {name!r} "
                    "out of source.tables.in_place"
                )
            path = entry.location
        at = Reference(path, prints[key][-1])
        result[name] = at, parquet.delta(spark, key, *at, _targets(cfg, modalities)[name], note)
    return result


def _fresh(inputs: Inputs, lake: Lake) -> bool:
    """Return whether the tables carry the input hash, and are where the config wants them."""
    newest, source = Lake(lake.root, {}), inputs.cfg.source.tables
    wanted = source.in_place if source else ()
    return lake.fresh(inputs.hash, *_writes(inputs.cfg)) and all(
        (in_place.reference(newest, name) is not None) == (name in wanted) for name in in_place.TABLES
    )


def _chunk(rows: int) -> int:
    return max(_CHUNK, -(-rows // _TASKS))


def _generate(
    spark: SparkSession, rows: int, chunk: int, make: Callable[[int, int], Iterator[pa.RecordBatch]], schema: pa.Schema
) -> DataFrame:
    """Return the rows that ``make(start, stop)`` yields for 0 to ``rows``, one Spark task a chunk."""
    chunks, start = -(-rows // chunk), F.col("id") * chunk
    ranges = spark.range(0, chunks, 1, max(chunks, 1)).select(
        start.alias("start"), F.least(start + chunk, F.lit(rows)).alias("stop")
    )
    return ranges.mapInArrow(partial(over_ranges, make), engine.struct(schema))


def _from_arrays(
    spark: SparkSession,
    source: ArraysSource,
    paths: dict[str, str],
    modalities: tuple[str, ...],
    note: Callable[[str], None],
) -> dict[str, DataFrame]:
    embeddings = {
        modality: str((Path(source.folder) / source.embeddings[modality]).absolute()) for modality in modalities
    }
    rows = arrays.check(paths["items"], embeddings)
    return {
        "items": _generate(
            spark, rows, _chunk(rows), partial(arrays.rows, paths["items"], embeddings), tables.items(modalities)
        ),
        "interactions": parquet.scan(spark, "source.arrays.interactions", paths["interactions"], parquet.EVENTS, note),
    }


@contextmanager
def _reading(cfg: Config) -> Iterator[None]:
    """Turn engine errors during the copy into one line that names the source."""
    try:
        yield
    except (Py4JJavaError, PySparkException) as error:
        cause = engine.root_cause(error)
        text = f"source.{cfg.source.kind} could not be copied into the lake ({cause}); check the files it names"
        raise engine.input_error(error) or folder.other_columns(error) or wrapped(error, text) from error


INGEST = Stage(
    "ingest",
    "spark",
    reads=stage.nothing,
    writes=_writes,
    appends=("rejected_rows",),
    settings=_settings,
    body=_build,
    prefix="ingest",
    fresh=_fresh,
)
"""Reads the source, writes raw items and interactions."""
