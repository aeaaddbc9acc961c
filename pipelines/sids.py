"""Write the semantic-ID table: encode on Spark, rank collisions, check the gates, and publish one generation."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pyspark import StorageLevel
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F
from pyspark.sql.types import StructType

from adasid import tables
from adasid.config import Config, Gates
from adasid.errors import GateError, InputError
from adasid.metrics.tally import Tally
from adasid.report.words import mean, plain
from adasid.sid import Slot
from adasid.tables import BEHAVIOR, PAD
from adasid.tokenizers import artifact
from adasid.tokenizers.artifact import Manifest
from adasid.tokenizers.encode import ENCODED, READ, encoder
from pipelines import generations, stage, staleness
from pipelines.engines import spark as engine
from pipelines.engines.lake import Lake
from pipelines.engines.tracking import StageContext
from pipelines.nightly import changes, drift, exports
from pipelines.nightly.lease import Lease, leased
from pipelines.stage import Inputs, Stage
from pipelines.training import tokenizer
from pipelines.training.register import register

_FAULTS = 100
"""At most this many kinds of faults are collected; there is one for each modality, and one for each wrong width."""


def run(cfg: Config, context: StageContext) -> None:
    """Encode ``item_features`` at its pinned version; write ``sids`` and a row of ``generations``.

    Raises GateError, with nothing published, when the table does not satisfy ``sids.gates``, or differs from the live
    one by more than ``retokenize.gates`` allow and ``sids.replace`` is false, or the live one is on hold. Raises
    InputError where ``item_features`` was not built from the newest tables.
    """
    step = declare(cfg)
    inputs = stage.resolve(step, cfg, context.lake)
    staleness.check(context, inputs.versions["item_features"])
    if stage.run(step, cfg, context, inputs) is None:
        if not generations.history(context.lake)[-1]["live"]:
            generations.check_hold(context.lake)
        context.status = "up to date"
    live = generations.live(context.lake)
    exports.point(cfg, context.lake)
    register(cfg, context, Path(live["artifact"]), live["tokenizer"], "champion")


def _artifact(cfg: Config, lake: Lake) -> Path:
    """Return the artifact to publish: that of ``sids.artifact``, else the one that the config trains on these
    tables."""
    if cfg.sids.artifact:
        return Path(cfg.sids.artifact)
    return tokenizer.folder_of(stage.resolve(tokenizer.declare(), cfg, lake)) / "model"


def _body(inputs: Inputs, context: StageContext) -> dict[str, int]:
    with leased(context, inputs.cfg.retokenize.lease) as lease:
        _publish(inputs, context, lease)
    return {}


def declare(cfg: Config) -> Stage:
    """Declare the stage that publishes the tokenizer's SIDs for all items."""
    pairs = ("item_pairs",) if cfg.tokenizer.pairs and not cfg.sids.artifact else ()
    return Stage(
        "sids",
        "spark",
        reads=lambda cfg: ("item_features",),
        writes=lambda cfg: ("sids", "sid_changes", "generations", "live", "leases"),
        also=("richness_stats", "item_stats", *pairs),
        settings=lambda cfg, lake: {
            "tokenizer": artifact.read_manifest(_artifact(cfg, lake)).digest,
            "sids.gates": cfg.sids.gates,
        },
        body=_body,
        prefix="sids",
        uses=() if cfg.sids.artifact else ("tokenizer",),
        fresh=lambda inputs, lake: generations.settled(lake, inputs.hash),
    )


def _publish(inputs: Inputs, context: StageContext, lease: Lease) -> None:
    cfg, lake, read, key = inputs.cfg, inputs.lake, inputs.versions, inputs.hash
    folder = _artifact(cfg, lake)
    manifest = artifact.read_manifest(folder)
    spark = engine.session(cfg.spark)
    exports.check(cfg, lake, read["item_features"])
    features = engine.read(spark, lake, "item_features", read["item_features"])
    check_features(features.schema, manifest)
    items = features.count()
    one_of = drift.every(items, cfg.retokenize.sample)
    encoded = encode(spark, features, folder, manifest, cfg.sids.batch, one_of).persist(StorageLevel.DISK_ONLY)
    try:
        slots, broken = list(manifest.slots), faults(encoded, manifest)
        metrics = measure(encoded, slots)
        gates = check_gates(metrics, cfg.sids.gates, items, encoded.select("item_id").distinct().count(), broken)
        context.metrics({name: value for name, value in metrics.items() if isinstance(value, (int, float))})
        failed = [gate for gate in gates if not gate["passed"]]
        if failed:
            raise GateError(
                f"semantic IDs not published: {failures(failed)}. The live generation is unchanged; train a better "
                "tokenizer, or change sids.gates"
            )
        before, number = generations.pointer(lake), generations.next_number(lake)
        live = generations.live(lake) if before else None
        moves, churn = None, {}
        if live:
            old = engine.read(spark, lake, "sids", live["sids_version"])
            other = live["metrics"]["slots"] != metrics["slots"]
            moves = changes.moved(old, encoded, "full", every=other)
            churn = changes.churn(moves, encoded, metrics, live["items"])
            churn["by_slot"] = {} if other else churn["by_slot"]
            gates += _replacing(cfg, context, live, churn)
            moves = moves.withColumn("generation", F.lit(number))
        baseline = drift.measure(lake, encoded, one_of)
        facts = {
            "generation": number,
            "inputs": read,
            "tokenizer": manifest.digest,
            "artifact": str(folder.resolve()),
            "run_date": None,
            "policy": "full",
            "items": metrics["items"],
            "gates": gates,
            "metrics": metrics,
            "drift": {
                "baseline": baseline,
                "counts": baseline["counts"],
                "usage": drift.usage(live["metrics"], metrics) if live else {},
            },
            "churn": churn,
        }
        generation = generations.publish(
            context,
            key,
            facts,
            before,
            partial(engine.write, ranked(encoded, manifest.digest, number), lake, "sids", tables.SIDS, key, few=True),
            None
            if moves is None
            else partial(
                engine.write, moves, lake, "sid_changes", tables.SID_CHANGES, key, replace=f"generation = {number}"
            ),
            before_live=partial(exports.write, cfg, lake, slots),
            allowed=lease.check,
        )["generation"]
    finally:
        encoded.unpersist()
    entropy = [value for value in metrics["entropy"] if value is not None]  # null for a slot that no item fills
    context.facts.update(
        {
            "generation": generation,
            "items": metrics["items"],
            "distinct SIDs": metrics["distinct"],
            "not unique": f"{metrics['collision_items']:.2%}",
            "largest group": metrics["largest_group"],
            "utilisation": round(float(np.mean(metrics["utilisation"])), 4),
            "mean entropy": f"{mean(entropy):.3f} of {math.log(manifest.slots[0].size):.3f} nats",
        }
    )


def _replacing(
    cfg: Config, context: StageContext, live: generations.Generation, churn: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return the gates of a table that replaces ``live``. Raises GateError where one failed and ``sids.replace`` is
    false."""
    gates = changes.gates(cfg, churn)
    failed = [gate for gate in gates if not gate["passed"]]
    if failed and not cfg.sids.replace:
        raise GateError(
            f"semantic IDs not published: {failures(failed)}. Generation {live['generation']} stays live; look at "
            "what changed in the source, or replace it on purpose with --set sids.replace=true"
        )
    for gate in failed:
        gate["overruled"] = "sids.replace"
        context.note(f"overruled by sids.replace: {failures([gate])}")
    context.facts.update(
        {why: churn[why] for why in ("new", "changed", "removed")} | {"churn": f"{churn['churn']:.2%}"}
    )
    return gates


def check_features(features: StructType, manifest: Manifest) -> None:
    """Raise InputError unless every column exists in its type, before any task starts. Further columns are ignored."""
    expected = {
        field.name: field.dataType
        for field in engine.struct(tables.item_features([m for m in manifest.widths if m != BEHAVIOR]))
    }
    for column in (*READ, *manifest.widths):
        if column not in features.fieldNames():
            who = f"the tokenizer {manifest.digest}" if column in manifest.widths else "the table of semantic IDs"
            raise InputError(
                f"{who} needs {column!r} but item_features has no such column: run jobs/build_features.py, or train on "
                "these features"
            )
        if features[column].dataType.simpleString() != expected[column].simpleString():
            kind = features[column].dataType.simpleString()
            raise InputError(
                f"item_features.{column} is {kind}, it must be {expected[column].simpleString()}: cast it, or run "
                "jobs/build_features.py"
            )


def encode(
    spark: SparkSession,
    features: DataFrame,
    folder: Path,
    manifest: Manifest,
    batch: int,
    one_of: int | None = None,
    previous: tuple[DataFrame, float] | None = None,
) -> DataFrame:
    """Return one row of :data:`ENCODED` for each row of ``features``; the weights are a broadcast of plain bytes.
    ``one_of``: the sampling stride of ``drift.every``, None: no item is sampled for drift; ``previous``: published SIDs
    [item_id, codes] and the tolerance within which items retain them."""
    weights = spark.sparkContext.broadcast((folder / "weights.safetensors").read_bytes())
    sampled = (F.lit(False) if one_of is None else drift.in_sample(one_of)).alias("sampled")
    text = manifest.json_text()
    rows, slack = features.select(*READ, *manifest.widths, sampled), 0.0
    if previous:
        published, slack = previous
        rows = rows.join(published.select("item_id", F.col("codes").alias("published")), "item_id", "left")
    return rows.mapInArrow(encoder(text, weights, batch, slack), engine.struct(ENCODED))


def ranked(
    encoded: DataFrame, tokenizer: str, generation: int, kept: DataFrame | None = None, before: DataFrame | None = None
) -> DataFrame:
    """Add the collision rank among the items of one SID. An item that has the codes of its row in ``before`` [item_id,
    codes, collision_rank] retains its rank. The others rank after those, and after the items of ``kept`` [codes,
    collision_rank] with the same SID; among themselves by (interactions desc, item_id)."""
    own, first = F.lit(None).cast("int"), F.lit(0)
    if before is not None:
        encoded = encoded.join(
            before.select("item_id", "codes", F.col("collision_rank").alias("_own")), ["item_id", "codes"], "left"
        )
        own = F.col("_own")
        first = F.coalesce(F.max(own).over(Window.partitionBy("codes")) + 1, first)
    if kept is not None:
        same = kept.join(encoded.select("codes").distinct(), "codes", "left_semi")
        encoded = encoded.join(
            same.groupBy("codes").agg((F.max("collision_rank") + 1).alias("_first")), "codes", "left"
        )
        first = F.greatest(first, F.coalesce("_first", F.lit(0)))
    new = (
        F.row_number().over(Window.partitionBy("codes").orderBy(own.isNotNull(), F.desc("interactions"), "item_id")) - 1
    )
    rank = F.coalesce(own, first + new).alias("collision_rank")
    return encoded.select("*", rank, F.lit(tokenizer).alias("tokenizer"), F.lit(generation).alias("generation"))


def faults(encoded: DataFrame, manifest: Manifest) -> int:
    """Count the items with a NaN or an infinity in a vector. Raises InputError where a vector's width is not the one
    that the tokenizer was trained on."""
    found = (
        encoded.filter("fault IS NOT NULL")
        .groupBy("fault")
        .agg(F.count("*").alias("items"), F.min("item_id").alias("first"))
        .orderBy("fault")
    )
    rows = found.limit(_FAULTS).collect()
    for row in rows:
        if "width" in row["fault"]:
            raise InputError(
                f"item_features.{row['fault']} as the tokenizer {manifest.digest} was trained on (items: "
                f"{row['items']}, first {row['first']!r}): "
                "train it on these features, or mend the embedding"
            )
    return sum(row["items"] for row in rows)


def measure(encoded: DataFrame, slots: list[Slot]) -> dict[str, Any]:
    """Return the metrics of a :class:`Tally`, as JSON data. Collects L x K rows and small histograms only."""
    tally = Tally.none(slots)
    for row in encoded.select(F.posexplode("codes").alias("slot", "code")).groupBy("slot", "code").count().collect():
        if row["code"] == PAD:
            tally.pad[row["slot"]] = row["count"]
        else:
            tally.codes[row["slot"], row["code"]] = row["count"]
    behavior = [index for index, slot in enumerate(slots) if slot.kind == BEHAVIOR]
    sums = [F.sum(F.col("weights")[i].cast("double")).alias(f"w{i}") for i in range(len(slots))]
    sums += [F.sum(F.col("active")[i].cast("int")).alias(f"a{i}") for i in range(len(slots))]
    slots_on = sum((F.col("active")[i].cast("int") for i in behavior), F.lit(0))
    sums += [F.sum((slots_on == n).cast("int")).alias(f"n{n}") for n in range(len(behavior) + 1)]
    number = F.count("*").alias("items"), F.sum("interactions").alias("events")
    for row in encoded.filter("stratum IS NOT NULL").groupBy("stratum").agg(*number, *sums).collect():
        place = tables.STRATA.index(row["stratum"])
        tally.items[place], tally.events[place] = row["items"], row["events"]
        tally.weights[place] = [row[f"w{i}"] for i in range(len(slots))]
        tally.active[place] = [row[f"a{i}"] for i in range(len(slots))]
        tally.slots_on[place] = [row[f"n{n}"] for n in range(len(behavior) + 1)]
    tail = F.col("stratum").isin("tail", "cold").cast("int")
    of_size = (
        encoded.groupBy("codes")
        .agg(F.count("*").alias("size"), F.coalesce(F.sum(tail), F.lit(0)).alias("tail"))
        .groupBy("size", "tail")
    )
    groups, tail_only, shared = Counter[int](), Counter[int](), 0
    for row in of_size.agg(F.count("*").alias("number")).collect():  # one row for each distinct (size, tail)
        groups[row["size"]] += row["number"]
        if row["tail"]:
            tail_only[row["tail"]] += row["number"]
            shared += row["tail"] * row["number"] * (row["size"] > 1)
    return replace(tally, groups=groups, tail_only=tail_only, shared=shared).metrics(slots)


def failures(failed: list[dict[str, Any]]) -> str:
    """Format failed gates as text."""
    of = (f" of {g['of']}" if "of" in g else "" for g in failed)
    parts = (f"{g['gate']} is {plain(g['value'])}{share}, allowed {g['threshold']:.4g}" for g, share in zip(failed, of))
    return "; ".join(parts)


def check_gates(
    metrics: dict[str, Any], gates: Gates, expected: int, distinct_items: int, broken: int
) -> list[dict[str, Any]]:
    """Check that every item occurs once, that codebooks are in use and that collisions are bounded."""
    checks = [
        ("coverage", metrics["items"] / max(1, expected), 1.0, metrics["items"] == expected > 0),
        ("duplicate items", metrics["items"] - distinct_items, 0.0, metrics["items"] == distinct_items),
        ("items with vectors that are not finite", broken, 0.0, not broken),
        (
            "lowest utilisation",
            min(metrics["utilisation"]),
            gates.min_utilisation,
            min(metrics["utilisation"]) >= gates.min_utilisation,
        ),
        (
            *("collision rate", metrics["collision_items"], gates.max_collision),
            metrics["collision_items"] is not None and metrics["collision_items"] <= gates.max_collision,
        ),
        ("largest group", metrics["largest_group"], gates.max_group, metrics["largest_group"] <= gates.max_group),
    ]
    return [
        {"gate": gate, "value": value, "threshold": threshold, "passed": bool(passed)}
        for gate, value, threshold, passed in checks
    ]
