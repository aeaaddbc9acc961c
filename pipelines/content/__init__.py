"""The stage that encodes raw text and pictures (``content.encoders``): Spark finds the contents without a vector, Ray
Data encodes them, Spark adds the vectors to ``content_embeddings``."""

from __future__ import annotations

import json
import operator
import time
import uuid
from collections.abc import Mapping
from functools import reduce
from pathlib import Path

import pyarrow as pa
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from adasid import tables
from adasid.config import Config, Encoder, digest
from adasid.config.content import TF_IDF
from adasid.encoders import places
from adasid.encoders.base import identity_of
from adasid.errors import GateError
from adasid.files import Location, location, remove
from pipelines import stage
from pipelines.content import fit, pool, rejected, vectors
from pipelines.content.vectors import EMBEDDINGS, ENCODERS
from pipelines.engines import cluster
from pipelines.engines import spark as engine
from pipelines.engines.lake import Lake
from pipelines.engines.tracking import StageContext
from pipelines.run import Run
from pipelines.sources import in_place
from pipelines.stage import Inputs, Stage

BROUGHT = "content.encoders is empty: the source brings all vectors"
_SECONDS = 10.0
"""Progress is printed at most this often."""
_ROW_GROUP = 16 * 2**20


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
    model = identity_of(_key(modality), encoder, fitted=state, offline=cfg.content.offline)
    return {"fields": list(encoder.read), **model}


def _build(inputs: Inputs, context: StageContext) -> dict[str, int]:
    cfg, lake, encoders = inputs.cfg, inputs.lake, chosen(inputs.cfg, inputs.lake)
    spark = engine.session(cfg.spark, size=in_place.size(lake, "items"))
    with in_place.reading(lake, "items"):
        items, encoded = vectors.raw(spark, cfg, lake), 0
        for modality, encoder in encoders.items():
            fit.ensure(items, encoder, fitted(cfg, encoder, modality), cfg.seed, context.note)
        identities = {modality: _identity(cfg, modality, encoder) for modality, encoder in encoders.items()}
        _check_same(cfg, lake, identities)
        digests = {modality: digest(identity) for modality, identity in identities.items()}
        for modality, encoder in encoders.items():
            revision = identities[modality].get("revision")
            settings = encoder.model_copy(update={"revision": revision}) if revision else encoder
            encoded += _encode(spark, inputs, context, items, modality, settings, digests[modality])
        if cfg.content.replace and lake.exists(EMBEDDINGS):
            _drop_others(spark, inputs, digests)
        written = {
            EMBEDDINGS: _stamp(spark, inputs),
            "rejected_rows": rejected.write(spark, inputs, context, items, digests),
        }
        rows = [
            {"modality": m, "encoder": digests[m], "identity": json.dumps(identity), "width": identity["width"]}
            for m, identity in identities.items()
        ]
        written[ENCODERS] = lake.write_rows(ENCODERS, tables.CONTENT_ENCODERS, rows, inputs.hash, inputs.versions)
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
    """Encode the contents of a modality that this encoder has not seen; return how many there were. The folder is that
    of the encoder, so that parts which an interrupted run has finished are added first, whatever changed since."""
    cfg, folder = inputs.cfg, Run(inputs.cfg).artifact("content", f"{modality}-{digest_of}")
    todo, done = folder / "todo", folder / "done"
    if found := _add(spark, inputs, modality, digest_of, done):
        context.note(f"{modality}: {found:,} contents of an interrupted run are added")
    remove(folder)
    _write_todo(spark, cfg, inputs.lake, items, modality, encoder, digest_of, todo)
    number = spark.read.parquet(engine.uri(todo)).count()
    if not number:
        remove(folder)
        return 0
    context.note(f"{modality}: {number:,} contents to encode with {encoder.model}")
    call = pool.Call(
        key=_key(modality),
        settings=encoder,
        digest=digest_of,
        todo=todo,
        done=done,
        fitted=fitted(cfg, encoder, modality),
        root=root_of(cfg) if encoder.field else None,
        roots=tuple(places.normal(root) for root in cfg.content.roots),
        offline=cfg.content.offline,
        threads=cluster.threads(cfg.ray),
        options=dict(cfg.storage.options),
    )
    started = said = time.monotonic()
    progress = pool.Progress()
    for progress in pool.encode(call, cfg.content.actors, cfg.ray):
        if progress.items < number and time.monotonic() - said >= _SECONDS:
            said = time.monotonic()
            context.note(f"{modality}: {progress.items:,} of {number:,}, {_speed(progress, said - started)}")
    seconds = time.monotonic() - started
    context.note(f"{modality}: {progress.items:,} encoded, {_speed(progress, seconds)}")
    speed = {"items_per_second": progress.items / seconds, "outside_model": progress.outside}
    context.metrics({f"{modality}_{name}": value for name, value in speed.items()})
    _add(spark, inputs, modality, digest_of, done)
    remove(folder)
    return number


def _speed(progress: pool.Progress, seconds: float) -> str:
    speed = progress.items / max(seconds, 1e-9)
    return f"{speed:,.1f} items/s, {progress.outside:.0%} of the actors' time outside the model"


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
    """Write the contents that this encoder has not seen, each once, to parts of ``content.part_items``. Only pictures
    that are in the table itself may be there more than once: to exchange them costs more than to encode copies."""
    raw = F.col(f"`{encoder.field}`") if encoder.field else vectors.text(encoder)
    rows = items.select(vectors.fingerprint(encoder).alias("fingerprint"), raw.alias(pool.RAW))
    rows = rows.filter("fingerprint IS NOT NULL")
    if lake.exists(EMBEDDINGS):
        seen = vectors.made_by(engine.read(spark, lake, EMBEDDINGS), modality, digest_of).filter(~_again())
        if not seen.isEmpty():
            new = rows.select("fingerprint").distinct().join(seen.select("fingerprint"), "fingerprint", "left_anti")
            rows = rows.join(new, "fingerprint", "left_semi")
    if encoder.field:
        inline = F.col(f"{pool.RAW}.bytes").isNotNull()
        rows = rows.filter(inline).unionByName(rows.filter(~inline).dropDuplicates(["fingerprint"]))
    else:
        rows = rows.dropDuplicates(["fingerprint"]).sortWithinPartitions("fingerprint")  # batches repeat
    with engine.row_groups(spark, _ROW_GROUP):  # without dictionaries, so that its metadata says what a row takes
        parts = rows.write.options(maxRecordsPerFile=cfg.content.part_items, **{"parquet.enable.dictionary": False})
        parts.mode("overwrite").parquet(engine.uri(todo))


def _again() -> Column:
    """Return whether a row is of a picture that was not looked at, and may be readable now."""
    return F.coalesce(F.col("reason").isin(*places.UNSEEN), F.lit(False))


def _add(spark: SparkSession, inputs: Inputs, modality: str, digest_of: str, done: Location) -> int:
    """Add the encoded contents of a folder to ``content_embeddings``, in place of pictures that were not looked at
    before; return how many there are. What has a vector keeps it."""
    if not list(done.glob("*.parquet")):
        return 0
    lake, schema = Lake(inputs.lake.root, {}), tables.CONTENT_EMBEDDINGS
    rows = spark.read.schema(engine.struct(pool.ENCODED)).parquet(engine.uri(done)).dropDuplicates(["fingerprint"])
    if lake.exists(EMBEDDINGS):
        seen = vectors.made_by(engine.read(spark, lake, EMBEDDINGS), modality, digest_of).filter(~_again())
        rows = rows.join(seen.select("fingerprint"), "fingerprint", "left_anti")
    added = {"modality": modality, "encoder": digest_of, "added": uuid.uuid4().hex}
    rows = rows.withColumns({name: F.lit(value) for name, value in added.items()})
    unseen = " OR ".join(f"reason = '{reason}'" for reason in places.UNSEEN)
    mine = f"modality = '{modality}' AND encoder = '{digest_of}' AND ({unseen})"
    _commit(inputs, rows.persist(), replace=f"added = '{added['added']}' OR ({mine})", schema=schema)
    number = rows.count()
    rows.unpersist()
    return number


def _commit(inputs: Inputs, rows: DataFrame, replace: str | None, schema: pa.Schema) -> int:
    return engine.write(
        rows, inputs.lake, EMBEDDINGS, schema, inputs.hash, replace=replace, few=True, sources=inputs.versions
    )


def _stamp(spark: SparkSession, inputs: Inputs) -> int:
    """Commit the input hash of this run to ``content_embeddings``, without a row; return the version."""
    lake, schema = Lake(inputs.lake.root, {}), tables.CONTENT_EMBEDDINGS
    if lake.exists(EMBEDDINGS) and lake.input_hash(EMBEDDINGS) == inputs.hash:
        return lake.version(EMBEDDINGS)
    nothing = spark.createDataFrame([], engine.struct(schema))
    return _commit(inputs, nothing, replace=f"added = '{uuid.uuid4().hex}'", schema=schema)


def _drop_others(spark: SparkSession, inputs: Inputs, digests: Mapping[str, str]) -> None:
    """Delete the vectors of other encoders."""
    rows = engine.read(spark, Lake(inputs.lake.root, {}), EMBEDDINGS)
    mine = reduce(operator.or_, [vectors.of_encoder(modality, digest_of) for modality, digest_of in digests.items()])
    if not rows.filter(~mine).isEmpty():
        _commit(inputs, rows.filter(mine), replace=None, schema=tables.CONTENT_EMBEDDINGS)


def root_of(cfg: Config) -> Location | None:
    """Return the folder to which paths of pictures refer, that of the source's files; absolute, as actors may work
    elsewhere."""
    source = cfg.source
    if source.folder:
        return location(places.normal(source.folder.folder)) / source.folder.pictures
    if source.amazon:
        return location(places.normal(source.amazon.pictures)) if source.amazon.pictures else None
    if source.tables and "/" in source.tables.items:
        return location(places.normal(source.tables.items)).parent
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
