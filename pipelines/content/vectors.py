"""Join items with the vectors of their raw text and pictures, by fingerprint: the one place where stages read the
vectors of items, whether the source brings them or encoders made them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from adasid import tables
from adasid.config import Config, Encoder
from adasid.config.content import TF_IDF
from adasid.encoders import hub, tfidf
from adasid.errors import InputError
from adasid.tokenizers.artifact import Manifest
from pipelines.engines.lake import Lake
from pipelines.engines.spark import read
from pipelines.sources import in_place, parquet

EMBEDDINGS, ENCODERS = "content_embeddings", "content_encoders"
_FIX = "run jobs/encode_content.py"


def needed(cfg: Config) -> tuple[str, ...]:
    """Return the tables beside ``items`` that :func:`items` reads, and on which rows depend; it reads ``ENCODERS``,
    too."""
    return (EMBEDDINGS,) if cfg.content.encoders else ()


def check(cfg: Config, lake: Lake) -> None:
    """Raise InputError unless the vectors are of the encoders and of the items that are read now."""
    if not cfg.content.encoders:
        return
    if not lake.exists(ENCODERS) or lake.input_hash(ENCODERS) != lake.input_hash(EMBEDDINGS):
        raise InputError(f"{EMBEDDINGS} is not complete (was its job cut off?): {_FIX}")
    known = {row["modality"]: json.loads(row["identity"]) for row in lake.read(ENCODERS).to_pylist()}
    for modality, encoder in cfg.content.encoders.items():
        key = f"content.encoders.{modality}"
        if modality not in known:
            raise InputError(f"{EMBEDDINGS} has no vectors of {key}: {_FIX}")
        if changed := _changed(encoder, known[modality]):
            fix = f"{_FIX} --set content.replace=true, or go back to that encoder"
            raise InputError(f"{key} is another encoder than that of the vectors in use ({changed}): {fix}")
    read_at, now = lake.lineage(EMBEDDINGS).get("items"), lake.version("items")
    if read_at != now and (read_at is None or lake.input_hash("items", read_at) != lake.input_hash("items", now)):
        raise InputError(f"{EMBEDDINGS} lags behind items (read at version {read_at}, now {now}): {_FIX}")


def _changed(encoder: Encoder, used: Mapping[str, Any]) -> str:
    """Say how an encoder of the config differs from the identity of the one ``used``; empty where it does not. Files
    of a model are not read: that a local folder has another one is left to jobs/encode_content.py."""
    given = encoder.model_dump(include={"prompt", "max_chars"}) | {"fields": list(encoder.read)}
    given["width"] = encoder.width or (tfidf.WIDTH if encoder.model == TF_IDF else None)
    if encoder.revision and hub.COMMIT.fullmatch(encoder.revision):  # a branch or a tag says nothing
        given["revision"] = encoder.revision
    if "model" in used or (used["kind"] == TF_IDF) != (encoder.model == TF_IDF):
        given["model"] = encoder.model
    before = {"model": used["kind"], **used}
    return "; ".join(
        f"{name} {before[name]!r} -> {value!r}"
        for name, value in given.items()
        if name in before and before[name] != value
    )


def encoders(lake: Lake) -> dict[str, str]:
    """Return modality -> digest of the encoder whose vectors are in use; empty where there is none."""
    if not lake.exists(ENCODERS):
        return {}
    return {row["modality"]: row["encoder"] for row in lake.read(ENCODERS).to_pylist()}


def check_tokenizer(lake: Lake, manifest: Manifest) -> None:
    """Raise InputError where a tokenizer was trained on vectors of another encoder than those in use."""
    used, trained = encoders(lake), (manifest.model_extra or {}).get("encoders", {})
    for modality, encoder in trained.items():
        if used.get(modality, encoder) != encoder:
            raise InputError(
                f"tokenizer {manifest.digest} was trained on vectors of another encoder of {modality!r} than "
                f"{ENCODERS} names: train a new one (jobs/train.py --stage tokenizer), or go back to that encoder"
            )


def fingerprint(encoder: Encoder) -> Column:
    """Return the MD5 of an item's raw fields; null where they are null or blank. Of a picture without bytes its path
    counts: a picture that is replaced under its path is not noticed."""
    if encoder.field:
        data, path = F.col(f"`{encoder.field}`.bytes"), F.col(f"`{encoder.field}`.path")
        named = F.when(F.trim(path) != "", F.concat(F.lit("path "), path))
        return F.coalesce(F.md5(data), F.md5(named.cast("binary")))
    joined = text(encoder)
    return F.when(F.trim(joined) != "", F.md5(joined.cast("binary")))


def text(encoder: Encoder) -> Column:
    """Return the text of an item: its fields that are not blank, with ". " between them."""
    fields = [F.nullif(F.trim(F.col(f"`{name}`")), F.lit("")) for name in encoder.fields]
    return F.concat_ws(". ", *fields)


def raw(spark: SparkSession, cfg: Config, lake: Lake) -> DataFrame:
    """Read ``items`` with the vectors and raw fields that this config uses."""
    return in_place.read(spark, lake, "items", parquet.items(cfg.brought, *cfg.content.raw()))


def items(spark: SparkSession, cfg: Config, lake: Lake) -> DataFrame:
    """Return ``items`` with the vectors of all modalities: item_id, title, a column a modality. Raises InputError where
    the vectors of encoders are missing or lag behind."""
    rows, used = raw(spark, cfg, lake), cfg.content.encoders
    order = ["item_id", "title", *cfg.features.content]
    order += [tables.BEHAVIOR] if cfg.behavior.source == "column" else []
    if not used:
        return rows
    check(cfg, lake)
    prints = [fingerprint(encoder).alias(f"_print_{modality}") for modality, encoder in used.items()]
    joined = rows.select("item_id", "title", *cfg.brought, *prints)
    made, digests = read(spark, lake, EMBEDDINGS), encoders(lake)
    for modality in used:
        vectors = made_by(made, modality, digests[modality]).select(
            F.col("fingerprint").alias(f"_print_{modality}"), "vector"
        )
        joined = joined.join(vectors, f"_print_{modality}", "left").withColumnRenamed("vector", modality)
    return joined.select(*order)


def made_by(embeddings: DataFrame, modality: str, encoder: str) -> DataFrame:
    """Return the rows of ``content_embeddings`` of a modality and the digest of its encoder."""
    return embeddings.filter(of_encoder(modality, encoder))


def of_encoder(modality: str, encoder: str) -> Column:
    """Return whether a row of ``content_embeddings`` is of a modality and the digest of its encoder."""
    return (F.col("modality") == modality) & (F.col("encoder") == encoder)
