"""A night: what changed since the live generation gets its SIDs under the config's policy, is measured, gated, and published or refused."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from py4j.protocol import Py4JJavaError
from pyspark import StorageLevel
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from adasid.config import Config, digest
from adasid.errors import GateError, InputError
from adasid.files import write_json
from adasid.tables import SID_CHANGES, SIDS
from pipelines import generations, sids, staleness
from pipelines.engines import spark as engine
from pipelines.engines.tracking import Track
from pipelines.nightly import changes, drift, incremental, refit, verdict
from pipelines.nightly.lease import held
from pipelines.nightly.night import Night
from pipelines.nightly.verdict import Found

_WORST = 10


def run(cfg: Config, track: Track, run_date: date, dry: bool = False) -> None:
    """Publish the night of ``run_date``, unless nothing changed. Raises BusyError while another run is at work, InputError for unusable input,
    GateError where the new table is refused; the live generation then stays as it is. ``dry``: measure and judge alone,
    under the lease too, as warm and refit write their tokenizers."""
    lake, settings = track.lake, cfg.retokenize
    with held(track, settings.lease) as lease:
        live, version = generations.live(lake), lake.version("item_features")
        staleness.check(track, version)
        day, before = run_date.isoformat(), live["run_date"]
        if before and day < before:
            raise InputError(
                f"run date {day} is before {before}, which generation {live['generation']} was published for: give {before} or a later one"
            )
        key = digest(
            "night",
            settings.policy,
            settings.slack,
            settings.refit_slack,
            settings.warm,
            settings.auto,
            live["generation"],
            live["tokenizer"],
            lake.stamps({"item_features": version}),
        )
        track.inputs({"item_features": version, "sids": live["sids_version"]})
        night = Night(cfg, track, lease, live, version, day, key, dry)
        if version == live["inputs"]["item_features"] and (settings.policy in {"frozen", "auto"} or before == day):
            night.unchanged()
            return
        try:
            if not incremental.publish(night):
                _publish(night)
        except (Py4JJavaError, PySparkException, OSError) as error:
            raise InputError(
                f"night {day}: item_features version {version} or sids version {live['sids_version']} cannot be worked on ({engine.root_cause(error)}); "
                f"generation {generations.pointer(lake)} stays live: mend the table or the disk that it names, then run the night again"
            ) from error


def _publish(night: Night) -> None:
    """Find what changed, encode it, measure, judge, publish: on Spark, for as many items as there are."""
    cfg, live = night.cfg, night.live
    folder, (_, manifest) = night.artifact, night.champion()
    found, today, how = changes.detect(night.spark, night.lake, night.features, night.published, live["inputs"]["item_features"], night.version)
    counts = {row["why"]: row["count"] for row in found.groupBy("why").count().collect()}
    night.found(how, counts)
    if not counts and cfg.retokenize.policy in {"frozen", "auto"}:
        night.unchanged()
        return
    try:
        made = _frozen(night, folder, manifest, found, today)
        drifted, policy = made.drifted, verdict.policy(cfg, made.drifted)
        night.track.note(f"policy {policy}")
        if policy == "frozen":
            _settle(night, made, policy, drifted)
            return
        made.free()
        told = dict(night.track.facts)
        try:
            _settle(night, _anew(night, policy, folder), policy, drifted)
        except GateError as refusal:
            if cfg.retokenize.policy != "auto" or night.live["hold"]:
                raise
            night.track.note(f"{refusal}. Policy frozen instead")
            night.track.facts = told  # what training said of the tokenizer that was refused
            _settle(night, _frozen(night, folder, manifest, found, today), "frozen", {**drifted, "asked": policy})
    finally:
        found.unpersist()


def _settle(night: Night, made: Made, policy: str, drifted: dict[str, Any]) -> None:
    """Measure and judge the table ``made`` under ``policy``, and publish it. ``drifted``: today against the live tokenizer. Raises GateError."""
    number, stamp = generations.next_number(night.lake), night.stamp(policy, made.manifest["digest"])
    moves = changes.moved(made.touched, made.encoded, policy).withColumn("generation", F.lit(number)).persist(StorageLevel.DISK_ONLY)
    try:
        measured = verdict.facts(night.cfg, night.live, night.version, _found(night, made, moves, drifted))
        facts = {"generation": number, "policy": policy, "run_date": night.day, **measured}
        night.measured(facts)
        _judge(night, facts, moves, made.whole)
        night.publish(
            facts,
            made.manifest,
            stamp,
            partial(engine.write, made.rows.select([field.name for field in SIDS]), night.lake, "sids", SIDS, stamp, few=True),
            partial(engine.write, moves, night.lake, "sid_changes", SID_CHANGES, stamp, replace=f"generation = {number}"),
        )
    finally:
        made.free()
        moves.unpersist()


def _found(night: Night, made: Made, moves: DataFrame, drifted: dict[str, Any]) -> Found:
    """What is measured of the new table. ``drifted``: today against the live tokenizer."""
    metrics = sids.measure(made.whole, night.slots(made.manifest))
    distinct, known = _counted(made.whole)
    return Found(
        folder=made.folder,
        tokenizer=made.manifest["digest"],
        metrics=metrics,
        churn=changes.churn(moves, made.whole, metrics, night.live["items"]),
        baseline=made.baseline,
        counts=made.day["counts"],
        drifted=drifted,
        items=night.features.count(),
        error=verdict.largest_error(made.drifted),
        distinct=distinct,
        known=known,
        broken=made.broken,
    )


@dataclass
class Made:
    """A night's ``rows`` of ``sids``, of which those ``encoded`` are new, by the artifact in ``folder``; ``whole``: what of all of them is measured
    (:data:`verdict.MEASURED`); ``touched``: the published rows that do not stay; ``baseline``: the day that the tokenizer knows, as ``drift.measure`` gives it; ``day``: today in its bins; ``drifted``: today
    against the live tokenizer's; ``broken``: items whose vectors are not finite."""

    folder: Path
    manifest: dict[str, Any]
    encoded: DataFrame
    rows: DataFrame
    whole: DataFrame
    touched: DataFrame
    baseline: dict[str, Any]
    day: dict[str, Any]
    drifted: dict[str, Any]
    broken: int

    def free(self) -> None:
        """Give the disk back that the tables take."""
        self.encoded.unpersist()
        self.whole.unpersist()


def _frozen(night: Night, folder: Path, manifest: dict[str, Any], found: DataFrame, today: DataFrame) -> Made:
    """The live tokenizer's SIDs for the items in ``found``, whose rows are ``today``; the published ones for all others."""
    known, lake = night.live["drift"]["baseline"], night.lake
    touched = night.published.join(found, "item_id", "left_semi")
    held = touched, night.cfg.retokenize.slack
    encoded = sids.encode(night.spark, today, folder, manifest, night.cfg.sids.batch, known["every"], held).persist(StorageLevel.DISK_ONLY)
    broken = sids.faults(encoded, manifest)
    kept = night.published.join(found, "item_id", "left_anti")
    new = sids.ranked(encoded, manifest["digest"], generations.next_number(lake), kept, touched)
    placed = kept.select("item_id", *verdict.MEASURED).join(night.features.select("item_id", "interactions", "stratum"), "item_id", "left")
    whole = placed.unionByName(encoded.select(placed.columns)).persist()
    day = drift.measure(lake, whole, known["every"], known["edges"])
    rows = kept.unionByName(new.select(kept.columns))
    return Made(folder, manifest, encoded, rows, whole, touched, known, day, drift.against(known, day), broken)


def _anew(night: Night, policy: str, live: Path) -> Made:
    """A new tokenizer, and its SIDs for all items. ``live``: the folder of the live tokenizer's artifact."""
    cfg, lake = night.cfg, night.lake
    folder, manifest = refit.fit(night, policy, live)
    one_of = drift.every(night.features.count(), cfg.retokenize.sample)
    held = night.published, cfg.retokenize.slack
    encoded = sids.encode(night.spark, night.features, folder, manifest, cfg.sids.batch, one_of, held).persist(StorageLevel.DISK_ONLY)
    broken = sids.faults(encoded, manifest)
    rows = sids.ranked(encoded, manifest["digest"], generations.next_number(lake), before=night.published)
    baseline = drift.measure(lake, encoded, one_of)
    drifted = drift.against(night.live["drift"]["baseline"], baseline)
    return Made(folder, manifest, encoded, rows, encoded, night.published, baseline, baseline, drifted, broken)


def _counted(whole: DataFrame) -> tuple[int, int]:
    """Different items of a table, and its rows that are of an item of today."""
    row = whole.agg(F.countDistinct("item_id").alias("distinct"), F.count("stratum").alias("known")).first()
    return (int(row["distinct"]), int(row["known"])) if row else (0, 0)


def _judge(night: Night, facts: dict[str, Any], moves: DataFrame, whole: DataFrame) -> None:
    """Raise GateError where a gate failed, with the worst items; the refusal is kept for the report."""
    failed = [gate for gate in facts["gates"] if not gate["passed"]]
    if not failed:
        return
    crowded = whole.groupBy("codes").agg(F.count("*").alias("n"), F.min("item_id").alias("item_id")).orderBy(F.desc("n"), "item_id").limit(_WORST)
    churned = moves.filter("old_codes IS NOT NULL AND new_codes IS NOT NULL").join(whole.select("item_id", "interactions"), "item_id")
    worst = {
        "most moved, by events": [row["item_id"] for row in churned.orderBy(F.desc("interactions"), "item_id").limit(_WORST).collect()],
        "of the largest groups": [f"{row['item_id']} ({row['n']})" for row in crowded.collect()],
    }
    night.track.client.log_dict(night.track.run_id, {"gates": facts["gates"], "worst": worst}, "refused.json")
    if not night.dry:
        kept = {name: value for name, value in facts.items() if name not in {"metrics", "drift"}}
        write_json(night.refused, {**kept, "worst": worst})
        night.pages()
    text = sids.failures(failed)
    if facts["policy"] != "frozen" and all(gate["gate"].startswith("churn") for gate in failed):
        text += f" (policy {facts['policy']}; to publish without moving SIDs: --set retokenize.policy=frozen; else raise retokenize.gates.max_churn)"
    text = f"{'dry run: ' if night.dry else ''}night {facts['run_date']} not published: {text}"
    raise GateError(
        f"{text}. Generation {night.live['generation']} stays live; worst items: "
        + "; ".join(f"{name}: {', '.join(items[:3])}" for name, items in worst.items() if items)
    )
