"""Write the semantic-ID table: encode on Spark, rank collisions, check the gates, and publish one generation."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
from pyspark import StorageLevel
from pyspark.sql import functions as F

from adasid import tables
from adasid.config import Config
from adasid.errors import GateError
from adasid.files import Location, location
from adasid.report.words import mean
from adasid.tokenizers import artifact
from pipelines import stage, staleness
from pipelines.content import vectors
from pipelines.engines import spark as engine
from pipelines.engines.lake import Lake
from pipelines.engines.tracking import StageContext
from pipelines.publish import drift, exports, generations, registration
from pipelines.publish.churn import measure_churn, moved
from pipelines.publish.collisions import ranked
from pipelines.publish.encode import check_features, encode, faults
from pipelines.publish.gates import Gate, Metrics, check_gates, churn_gates, failures
from pipelines.publish.generations import Candidate, Generation
from pipelines.publish.lease import Lease, check_pins, leased
from pipelines.publish.measure import measure
from pipelines.run import Run
from pipelines.sources import in_place
from pipelines.stage import Inputs, Stage
from pipelines.training import tokenizer
from pipelines.training.register import register


def run(cfg: Config, context: StageContext) -> None:
    """Encode ``item_features`` at its pinned version; write ``sids`` and a row of ``generations``.

    Raises GateError, with nothing published, when the table does not satisfy ``sids.gates``, or differs from the live
    one by more than ``retokenize.gates`` allow and ``sids.replace`` is false, or the live one is on hold. Raises
    InputError where ``item_features`` was not built from the newest tables.
    """
    check_pins(cfg)
    if generations.pointer(context.lake) is not None:
        exports.point(cfg, context.lake)  # a roll-back or a publication that was killed may not have done this
    step = declare(cfg)
    inputs = stage.resolve(step, cfg, context.lake)
    staleness.check(context, inputs.versions["item_features"])
    if stage.run(step, cfg, context, inputs) is None:
        if not generations.history(context.lake)[-1].live:
            generations.check_hold(context.lake)
        context.status = "up to date"
    else:
        Run(cfg).refused.unlink(missing_ok=True)  # the table that it kept live has been replaced
    live = generations.live(context.lake)
    exports.point(cfg, context.lake)
    registration.register(cfg, context)
    register(cfg, context, Run(cfg).of_name(live.artifact), live.tokenizer, "champion")


def _artifact(cfg: Config, lake: Lake) -> Location:
    """Return the artifact to publish: that of ``sids.artifact``, else the one that the config trains on these
    tables."""
    if cfg.sids.artifact:
        named = location(cfg.sids.artifact)
        # as the table generations names it: relative to the run's folder
        return named if (named / "manifest.json").exists() else Run(cfg).of_name(cfg.sids.artifact)
    return tokenizer.folder_of(stage.resolve(tokenizer.declare(), cfg, lake)) / "model"


def _body(inputs: Inputs, context: StageContext) -> dict[str, int]:
    with leased(context, inputs.cfg.retokenize.lease) as lease:
        if generations.settled(context.lake, inputs.hash):  # another run did it while this one waited
            context.status = "up to date"
        else:
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
        also=("richness_stats", "item_stats", vectors.ENCODERS, *pairs),
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
    cfg, lake, key = inputs.cfg, inputs.lake, inputs.hash
    folder, version = _artifact(cfg, lake), inputs.versions["item_features"]
    manifest = artifact.read_manifest(folder)
    spark = engine.session(cfg.spark, size=in_place.size(lake, *inputs.versions))
    registration.check(cfg, context)
    exports.check(cfg, lake, version)
    features = engine.read(spark, lake, "item_features", version)
    check_features(features.schema, manifest)
    vectors.check_tokenizer(lake, manifest)
    items = features.count()
    stride = drift.sampling_stride(items, cfg.retokenize.sample)
    encoded = encode(spark, features, folder, manifest, cfg.sids.batch, stride).persist(StorageLevel.DISK_ONLY)
    try:
        slots, broken = list(manifest.slots), faults(encoded, manifest)
        metrics = measure(encoded, slots)
        gates = check_gates(metrics, cfg.sids.gates, items, encoded.select("item_id").distinct().count(), broken)
        context.metrics({name: value for name, value in metrics.items() if isinstance(value, (int, float))})
        failed = [gate for gate in gates if not gate.passed]
        if failed:
            raise GateError(
                f"semantic IDs not published: {failures(failed)}. The live generation is unchanged; train a better "
                "tokenizer, or change sids.gates"
            )
        before, number = generations.pointer(lake), generations.next_number(lake)
        live = generations.live(lake) if before else None
        moves, churn, ranks = None, Metrics(), None
        if live:
            old = engine.read(spark, lake, "sids", live.sids_version)
            other_slots = live.metrics["slots"] != metrics["slots"]
            ranks = None if other_slots else old
            moves = moved(old, encoded, "full", every=other_slots)
            churn = measure_churn(moves, encoded, metrics, live.items)
            churn["by_slot"] = {} if other_slots else churn["by_slot"]
            gates += _replacing(cfg, context, live, churn)
            moves = moves.withColumn("generation", F.lit(number))
        baseline = drift.measure(lake, encoded, stride)
        candidate = Candidate(
            generation=number,
            policy="full",
            run_date=None,
            inputs=inputs.versions,
            tokenizer=manifest.digest,
            artifact=Run(cfg).named(folder),
            items=metrics["items"],
            metrics=metrics,
            gates=tuple(gates),
            churn=churn,
            drift={
                "baseline": baseline,
                "counts": baseline["counts"],
                "usage": drift.usage(live.metrics, metrics) if live else {},
            },
        )
        generation = generations.publish(
            context,
            key,
            candidate,
            before,
            partial(
                engine.write,
                ranked(encoded, manifest.digest, number, before=ranks),
                lake,
                "sids",
                tables.SIDS,
                key,
                few=True,
            ),
            None
            if moves is None
            else partial(
                engine.write, moves, lake, "sid_changes", tables.SID_CHANGES, key, replace=f"generation = {number}"
            ),
            before_live=partial(exports.write, cfg, lake, slots, allowed=lease.check),
            allowed=lease.check,
        )
    finally:
        encoded.unpersist()
    entropy = [value for value in metrics["entropy"] if value is not None]  # null for a slot that no item fills
    context.facts.update(
        {
            "generation": generation.generation,
            "items": metrics["items"],
            "distinct SIDs": metrics["distinct"],
            "not unique": f"{metrics['collision_items']:.2%}",
            "largest group": metrics["largest_group"],
            "utilisation": round(float(np.mean(metrics["utilisation"])), 4),
            "mean entropy": f"{mean(entropy):.3f} of {math.log(manifest.slots[0].size):.3f} nats",
        }
    )


def _replacing(cfg: Config, context: StageContext, live: Generation, churn: Metrics) -> list[Gate]:
    """Return the gates of a table that replaces ``live``. Raises GateError where one failed and ``sids.replace`` is
    false."""
    gates = churn_gates(cfg, churn)
    failed = [gate for gate in gates if not gate.passed]
    if failed and not cfg.sids.replace:
        raise GateError(
            f"semantic IDs not published: {failures(failed)}. Generation {live.generation} stays live; look at "
            "what changed in the source, or replace it on purpose with --set sids.replace=true"
        )
    for gate in failed:
        context.note(f"overruled by sids.replace: {failures([gate])}")
    context.facts.update(
        {why: churn[why] for why in ("new", "changed", "removed")} | {"churn": f"{churn['churn']:.2%}"}
    )
    return [gate if gate.passed else gate.model_copy(update={"overruled": "sids.replace"}) for gate in gates]
