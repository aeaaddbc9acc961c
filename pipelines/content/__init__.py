"""The stage that encodes raw text and pictures (``content.encoders``): Spark finds the contents without a vector, Ray
Data encodes them, Spark adds the vectors to ``content_embeddings``."""

from __future__ import annotations

import json
import time
from collections import Counter
from functools import reduce
from pathlib import Path

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from adasid import tables
from adasid.config import Config, Encoder, digest
from adasid.config.content import TF_IDF
from adasid.encoders import places
from adasid.encoders.base import ABSENT, identity_of
from adasid.errors import GateError
from adasid.files import Location, location, remove, write_text
from pipelines import stage
from pipelines.content import fit, pool, vectors
from pipelines.content.vectors import EMBEDDINGS, ENCODERS
from pipelines.engines import spark as engine
from pipelines.engines.lake import Lake
from pipelines.engines.tracking import StageContext
from pipelines.run import Run
from pipelines.sources import in_place
from pipelines.stage import Inputs, Stage

BROUGHT = "content.encoders is empty: the source brings all vectors"
_FAULT = "content_"
"""Reasons of rejected contents begin with it in ``rejected_rows``."""
_SECONDS = 10.0
"""Progress is printed at most this often."""
_ROW_GROUP = 16 * 2**20
_READY = "ready.json"
"""Parts are complete where their folder has this file."""


def run(cfg: Config, context: StageContext) -> None:
    """Encode what has no vector yet; write ``content_embeddings`` and ``content_encoders``. Skipped without encoders.

    Contents that cannot be encoded are rows of ``rejected_rows`` with a reason; their items live on without the
    modality. Raises GateError where an encoder is another than that of the vectors in use and ``content.replace`` is
    false.
    """
    if not cfg.content.encoders:
        context.status = "not needed"
        context.note(BROUGHT)
    elif stage.run(CONTENT, cfg, context) is None:
        context.status = "up to date"


def chosen(cfg: Config, lake: Lake) -> dict[str, Encoder]:
    """Return the encoders by modality: local folders as absolute paths, and each with the revision at which it was used
    first where the config names none."""
    used = {}
    if lake.exists(ENCODERS):
        used = {row["modality"]: json.loads(row["identity"]) for row in lake.read(ENCODERS).to_pylist()}
    found = dict[str, Encoder]()
    for modality, encoder in cfg.content.encoders.items():
        before = used.get(modality, {})
        revision = before.get("revision") if before.get("model") == encoder.model else None
        model = str(Path(encoder.model).absolute()) if Path(encoder.model).is_dir() else encoder.model
        found[modality] = encoder.model_copy(update={"model": model, "revision": encoder.revision or revision})
    return found


def fitted(cfg: Config, encoder: Encoder, modality: str) -> Location | None:
    """Return the folder of tf-idf's document frequencies; None for a model."""
    if encoder.model != TF_IDF:
        return None
    return Run(cfg).artifact("content", f"{modality}-{digest(encoder.fields, encoder.max_chars, encoder.width)}")


def _key(modality: str) -> str:
    return f"content.encoders.{modality}"


def _settings(cfg: Config, lake: Lake) -> dict[str, object]:
    result = dict[str, dict[str, object]]()
    for modality, encoder in chosen(cfg, lake).items():
        reads = {"fields": list(encoder.read)}
        reads |= encoder.model_dump(include={"max_bytes", "max_pixels", "web"}) if encoder.field else {}
        known = _model(encoder) if encoder.model == TF_IDF else _identity(cfg, modality, encoder)
        result[modality] = {**reads, **known}
    return {"content.encoders": result}


def _model(encoder: Encoder) -> dict[str, object]:
    """Return what tf-idf depends on before its words are counted."""
    return {"model": TF_IDF, **encoder.model_dump(include={"width", "max_chars"})}


def _identity(cfg: Config, modality: str, encoder: Encoder) -> dict[str, object]:
    state = fitted(cfg, encoder, modality)
    return dict(identity_of(_key(modality), encoder, fitted=state, offline=cfg.content.offline))


def _build(inputs: Inputs, context: StageContext) -> dict[str, int]:
    cfg, lake, encoders = inputs.cfg, inputs.lake, chosen(inputs.cfg, inputs.lake)
    spark = engine.session(cfg.spark, size=in_place.size(lake, "items"))
    with in_place.reading(lake, "items"):
        items = vectors.raw(spark, cfg, lake)
        for modality, encoder in encoders.items():
            fit.ensure(items, encoder, fitted(cfg, encoder, modality), cfg.seed, context.note)
        identities = {modality: _identity(cfg, modality, encoder) for modality, encoder in encoders.items()}
        _check_same(cfg, lake, identities)
        folder, encoded = Run(cfg).artifact("content", inputs.hash), 0
        for modality, encoder in encoders.items():
            encoded += _encode(spark, inputs, context, items, modality, encoder, digest(identities[modality]))
        written = _add(spark, inputs, folder, {m: digest(identity) for m, identity in identities.items()})
        rows = [
            {"modality": m, "encoder": digest(identity), "identity": json.dumps(identity), "width": identity["width"]}
            for m, identity in identities.items()
        ]
        written[ENCODERS] = lake.write_rows(ENCODERS, tables.CONTENT_ENCODERS, rows, inputs.hash, inputs.versions)
        written["rejected_rows"] = _reject(spark, inputs, context, items, encoders)
    remove(folder)
    context.facts["encoded"] = encoded
    return written


def _check_same(cfg: Config, lake: Lake, identities: dict[str, dict[str, object]]) -> None:
    """Raise GateError where an encoder is another than that of the vectors in use, unless the config asks for it."""
    used = {row["modality"]: row for row in lake.read(ENCODERS).to_pylist()} if lake.exists(ENCODERS) else {}
    for modality, identity in identities.items():
        row = used.get(modality)
        if cfg.content.replace or row is None or row["encoder"] == digest(identity):
            continue
        before = json.loads(row["identity"])
        parts = [
            f"{name} {before.get(name)!r} -> {identity.get(name)!r}"
            for name in dict.fromkeys((*before, *identity))
            if before.get(name) != identity.get(name)
        ]
        raise GateError(
            f"{_key(modality)} is another encoder than that of the vectors in use ({'; '.join(parts)}): all items "
            "would be encoded again, and all SIDs would move. The tables are unchanged; go back to the former encoder, "
            "or replace it on purpose with --set content.replace=true, and train a tokenizer on the new vectors"
        )


def _encode(
    spark: SparkSession,
    inputs: Inputs,
    context: StageContext,
    items: DataFrame,
    modality: str,
    encoder: Encoder,
    digest_of: str,
) -> int:
    """Encode the contents of a modality without a vector into ``done/<modality>``; return how many there were."""
    cfg, folder = inputs.cfg, Run(inputs.cfg).artifact("content", inputs.hash)
    todo, done = folder / "todo" / modality, folder / "done" / modality
    if not (todo / _READY).exists():
        remove(todo)
        _write_todo(spark, cfg, inputs.lake, items, modality, encoder, digest_of, todo)
        contents = spark.read.parquet(engine.uri(todo)).count()
        write_text(todo / _READY, json.dumps({"contents": contents}))
    number = int(json.loads((todo / _READY).read_text(encoding="utf-8"))["contents"])
    parts, finished = (len(list(where.glob("*.parquet"))) for where in (todo, done))
    if number == 0 or parts == finished:
        return number
    left = f"; {finished} of {parts} parts are done already" if finished else ""
    context.note(f"{modality}: {number:,} contents to encode with {encoder.model}{left}")
    call = pool.Call(
        _key(modality),
        encoder,
        todo,
        done,
        fitted(cfg, encoder, modality),
        root_of(cfg),
        cfg.content.offline,
        max(1, round(cfg.ray.cpus_per_worker)),
        dict(cfg.storage.options),
    )
    started = said = time.monotonic()
    progress = pool.Progress()
    for progress in pool.encode(call, cfg.content.actors, cfg.ray):
        due = number - finished * number // parts
        if progress.items < due and time.monotonic() - said >= _SECONDS:
            said = time.monotonic()
            context.note(f"{modality}: {progress.items:,} of {due:,}, {_speed(progress, said - started)}")
    seconds = time.monotonic() - started
    context.note(f"{modality}: {progress.items:,} encoded, {_speed(progress, seconds)}")
    outside = 1 - progress.model / max(progress.busy, 1e-9)
    context.metrics({f"{modality}_items_per_second": progress.items / seconds, f"{modality}_outside_model": outside})
    return number


def _speed(progress: pool.Progress, seconds: float) -> str:
    outside = 1 - progress.model / max(progress.busy, 1e-9)
    return f"{progress.items / max(seconds, 1e-9):,.1f} items/s, {outside:.0%} of the actors' time outside the model"


def _write_todo(
    spark: SparkSession,
    cfg: Config,
    lake: Lake,
    items: DataFrame,
    modality: str,
    encoder: Encoder,
    digest_of: str,
    todo: Location,
) -> None:
    """Write the contents that this encoder has not seen, each once, to parts of ``content.part_items``."""
    raw = F.col(f"`{encoder.field}`") if encoder.field else vectors.text(encoder)
    rows = items.select(vectors.fingerprint(encoder).alias("fingerprint"), raw.alias(pool.RAW), "item_id")
    rows = rows.filter("fingerprint IS NOT NULL")
    if lake.exists(EMBEDDINGS):
        known = engine.read(spark, lake, EMBEDDINGS).filter(
            (F.col("modality") == modality) & (F.col("encoder") == digest_of) & ~_again()
        )
        rows = rows.join(known.select("fingerprint"), "fingerprint", "left_anti")
    if not encoder.field:  # to exchange pictures would cost more than to encode copies of them
        rows = rows.dropDuplicates(["fingerprint"])
    with engine.row_groups(spark, _ROW_GROUP):
        parts = rows.select("fingerprint", pool.RAW).write.option("maxRecordsPerFile", cfg.content.part_items)
        parts.mode("overwrite").parquet(engine.uri(todo))


def _again() -> Column:
    """Return whether a row is of a picture that was not looked at, and may be readable now."""
    return F.coalesce(F.col("reason").isin(*places.UNSEEN), F.lit(False))


def _add(spark: SparkSession, inputs: Inputs, folder: Location, digests: dict[str, str]) -> dict[str, int]:
    """Add the encoded contents to ``content_embeddings``, in place of those of an interrupted run on the same inputs;
    where an encoder is another, the vectors of others go."""
    frames, lake = list[DataFrame](), inputs.lake
    for modality, encoder in digests.items():
        done = folder / "done" / modality
        if not list(done.glob("*.parquet")):
            continue
        rows = spark.read.schema(engine.struct(pool.ENCODED)).parquet(engine.uri(done))
        added = {"modality": F.lit(modality), "encoder": F.lit(encoder), "input_hash": F.lit(inputs.hash)}
        frames.append(rows.dropDuplicates(["fingerprint"]).withColumns(added))
    schema = tables.CONTENT_EMBEDDINGS
    empty = spark.createDataFrame([], engine.struct(schema))
    new = reduce(DataFrame.unionByName, [frame.select(*schema.names) for frame in frames], empty)
    tried = " OR ".join(f"reason = '{reason}'" for reason in places.UNSEEN)  # they were encoded again
    where: str | None = f"input_hash = '{inputs.hash}' OR {tried}"
    if lake.exists(EMBEDDINGS):
        old = engine.read(spark, lake, EMBEDDINGS)
        mine = [(F.col("modality") == m) & (F.col("encoder") == encoder) for m, encoder in digests.items()]
        stays = reduce(lambda one, other: one | other, mine)
        if not old.filter(~stays).isEmpty():
            new = new.unionByName(old.filter(stays & (F.col("input_hash") != inputs.hash) & ~_again()))
            where = None
    return {
        EMBEDDINGS: engine.write(
            new, lake, EMBEDDINGS, schema, inputs.hash, replace=where, few=True, sources=inputs.versions
        )
    }


def _reject(
    spark: SparkSession, inputs: Inputs, context: StageContext, items: DataFrame, encoders: dict[str, Encoder]
) -> int:
    """Write a row of ``rejected_rows`` for each item whose content could not be encoded; return the version."""
    lake, frames = Lake(inputs.lake.root, {}), list[DataFrame]()
    for modality, encoder in encoders.items():
        faults = vectors.current(spark, lake, modality).filter(f"reason IS NOT NULL AND reason != '{ABSENT}'")
        if faults.isEmpty():
            continue
        path = F.col(f"`{encoder.field}`.path") if encoder.field else F.substring(vectors.text(encoder), 1, 200)
        rows = items.select("item_id", vectors.fingerprint(encoder).alias("fingerprint"), path.alias("content"))
        bad = rows.join(F.broadcast(faults.select("fingerprint", "reason")), "fingerprint")
        row = F.to_json(F.struct("item_id", F.lit(modality).alias("modality"), "content"))
        named = bad.select(F.concat(F.lit(_FAULT), "reason").alias("reason"), row.alias("row"))
        frames.append(named.groupBy("reason", "row").agg(F.count("*").alias("copies")))
    schema = tables.REJECTED_ROWS
    if not frames:
        if not lake.exists("rejected_rows"):
            return lake.write_rows("rejected_rows", schema, [], inputs.hash)
        return lake.version("rejected_rows")
    added = {"input_hash": F.lit(inputs.hash), "table": F.lit("items"), "row_hash": F.sha2("row", 256)}
    rows = reduce(DataFrame.unionByName, frames).withColumns(added).persist()
    totals = rows.groupBy("reason").agg(F.sum("copies").alias("items")).collect()
    counts = Counter({found["reason"].removeprefix(_FAULT): found["items"] for found in totals})
    listed = ", ".join(f"{reason} {number:,}" for reason, number in counts.most_common())
    context.note(f"items without a modality because of their content: {listed}")
    context.facts["refused contents"] = counts.total()
    where = f"input_hash = '{inputs.hash}'"
    version = engine.write(rows, inputs.lake, "rejected_rows", schema, inputs.hash, replace=where)
    rows.unpersist()
    return version


def root_of(cfg: Config) -> Location | None:
    """Return the folder to which relative paths of pictures refer: that of the source's files."""
    source = cfg.source
    if source.folder:
        return location(source.folder.folder) / source.folder.pictures
    if source.amazon:
        return location(source.amazon.pictures) if source.amazon.pictures else None
    if source.tables and "/" in source.tables.items:
        return location(source.tables.items.rstrip("/").rpartition("/")[0] or "/")
    return None


CONTENT = Stage(
    "content",
    "ray",
    reads=lambda cfg: ("items",),
    writes=lambda cfg: (EMBEDDINGS, ENCODERS),
    also=(EMBEDDINGS, ENCODERS),
    appends=("rejected_rows",),
    settings=_settings,
    body=_build,
    prefix="content",
)
"""Reads raw text and pictures, writes their vectors."""
