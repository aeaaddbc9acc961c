"""A night: what changed since the live generation gets its SIDs under the config's policy, is measured, gated, and published or refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from py4j.protocol import Py4JJavaError
from pyspark import StorageLevel
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from adasid.config import Config, digest
from adasid.errors import GateError, InputError
from adasid.report import nights
from adasid.tables import SIDS
from adasid.tokenizers import artifact
from adasid.tokenizers.base import Slot
from adasid.training.checkpoint import write_json
from pipelines import generations, report, sids
from pipelines.engines import spark as engine
from pipelines.engines.lake import Lake
from pipelines.engines.tracking import Track
from pipelines.generations import Generation
from pipelines.nightly import changes, drift, exports, refit
from pipelines.nightly.lease import Lease, held

_WORST = 10
_REFUSED = "refused.json"
_MEASURED = ("codes", "weights", "active", "gauges")
"""What is measured of a row, beside its item's interactions and stratum; the rest of a row that stays is read once, to write it."""


@dataclass
class Night:
    """What a night works on: the live generation, today's features, and the SIDs that are published."""

    cfg: Config
    track: Track
    lease: Lease
    live: Generation
    version: int
    spark: SparkSession
    features: DataFrame
    published: DataFrame

    @property
    def lake(self) -> Lake:
        """The lake."""
        return self.track.lake


def run(cfg: Config, track: Track, run_date: date) -> None:
    """Publish the night of ``run_date``, unless nothing changed. Raises BusyError while another run is at work, InputError for unusable input,
    GateError where the new table is refused; the live generation then stays as it is."""
    lake, settings = track.lake, cfg.retokenize
    with held(track, settings.lease) as lease:
        live, version = generations.live(lake), lake.version("item_features")
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
        if version == live["inputs"]["item_features"] and (settings.policy in {"frozen", "auto"} or before == day):
            _unchanged(track, live)
            return
        spark = engine.session(cfg.spark)
        night = Night(
            cfg,
            track,
            lease,
            live,
            version,
            spark,
            engine.read(spark, lake, "item_features", version),
            engine.read(spark, lake, "sids", live["sids_version"]),
        )
        try:
            _publish(night, key, day)
        except (Py4JJavaError, PySparkException) as error:
            raise InputError(
                f"night {day}: item_features version {version} or sids version {live['sids_version']} cannot be worked on ({engine.root_cause(error)}); "
                f"generation {generations.pointer(lake)} stays live: mend the table or the disk that it names, then run the night again"
            ) from error


def _unchanged(track: Track, live: Generation) -> None:
    track.status = "up to date"
    track.note(f"no item is new, changed or removed since generation {live['generation']}")
    track.facts.update({"generation": live["generation"], "items": live["items"]})


def _publish(night: Night, key: str, day: str) -> None:
    """Find what changed, encode it, measure, judge, publish."""
    cfg, live, folder = night.cfg, night.live, Path(night.live["artifact"])
    manifest = _champion(night, folder)
    found, today, how = changes.detect(night.spark, night.lake, night.features, night.published, live["inputs"]["item_features"], night.version)
    counts = {row["why"]: row["count"] for row in found.groupBy("why").count().collect()}
    night.track.facts["found by"] = how
    night.track.note(f"by {how}: " + ", ".join(f"{counts.get(why, 0)} {why}" for why in ("new", "changed", "removed")))
    if not counts and cfg.retokenize.policy in {"frozen", "auto"}:
        _unchanged(night.track, live)
        return
    made = _frozen(night, folder, manifest, found, today)
    drifted, policy = made.drifted, _policy(cfg, made.drifted)
    night.track.note(f"policy {policy}")
    if policy != "frozen":
        made.free()
        made = _anew(night, policy, folder)
    number = generations.next_number(night.lake)
    moves = changes.moved(made.touched, made.encoded, policy).withColumn("generation", F.lit(number)).persist(StorageLevel.DISK_ONLY)
    try:
        slots = [Slot(**slot) for slot in made.manifest["slots"]]
        facts = {"generation": number, "policy": policy, "run_date": day, **_measured(night, made, moves, slots, drifted)}
        _judge(night, facts, moves, made.whole)
        row = generations.publish(
            night.track,
            digest(key, policy, made.manifest["digest"]),
            facts,
            live["generation"],
            made.rows.select([field.name for field in SIDS]),
            moves,
            before_live=partial(exports.write, cfg, night.lake, slots),
            allowed=night.lease.check,
        )
    finally:
        made.free()
        for frame in (moves, found):
            frame.unpersist()
    night.track.status = "done"  # whatever training the tokenizer said
    (cfg.run_dir / _REFUSED).unlink(missing_ok=True)
    pages(cfg, night.track)
    churned = facts["churn"]
    told = {"generation": row["generation"], "policy": policy, "items": facts["items"]} | {why: churned[why] for why in ("new", "changed", "removed")}
    night.track.facts.update(told | {"churn": f"{churned['churn']:.2%}"})


def _champion(night: Night, folder: Path) -> dict[str, Any]:
    """The manifest of the live tokenizer, which is whole and takes today's features."""
    manifest = artifact.read(folder)[1]  # damaged weights are found here, not in a task
    live = night.live["tokenizer"]
    if manifest["digest"] != live:
        raise InputError(
            f"artifact {folder}: tokenizer {manifest['digest']}, but the live SIDs are of {live}: put that artifact back, or run jobs/write_sids.py"
        )
    sids.check_features(night.features, manifest)
    return manifest


def _measured(night: Night, made: Made, moves: DataFrame, slots: list[Slot], drifted: dict[str, Any]) -> dict[str, Any]:
    """What the generation's row says of the new table, gates and all."""
    cfg, live, items = night.cfg, night.live, night.features.count()
    metrics = sids.measure(made.whole, slots)
    usage = drift.usage(live["metrics"], metrics)
    churned = changes.churn(moves, made.whole, metrics, live["items"])
    distinct, known = _counted(made.whole)
    gates = sids.check_gates(metrics, cfg.sids.gates, items, distinct, made.broken)
    unmatched, removed = metrics["items"] - known + abs(items - known), churned["removed"] / max(1, live["items"])
    gates += _night_gates(cfg, metrics, churned, _error(made.drifted), removed, unmatched)
    _tracked(night.track, metrics, churned, drifted, usage)
    return {
        "inputs": {"item_features": night.version},
        "tokenizer": made.manifest["digest"],
        "artifact": str(made.folder),
        "items": metrics["items"],
        "metrics": metrics,
        "gates": gates,
        "churn": churned,
        "drift": {**drifted, "cold": metrics["items_by_stratum"].get("cold", 0) / max(1, items), "usage": usage, "baseline": made.baseline},
    }


def pages(cfg: Config, track: Track) -> None:
    """The page of the last generations, ``<run>/report/nights``, and its figures, also to MLflow."""
    folder, refused = cfg.run_dir / "report" / "nights", cfg.run_dir / _REFUSED
    left = json.loads(refused.read_text(encoding="utf-8")) if refused.exists() else None
    report.write(folder, nights.build(cfg.name, generations.history(track.lake)[-cfg.retokenize.keep :], left))
    track.artifact(folder)
    track.facts["page"] = str(folder / "index.html")


@dataclass
class Made:
    """A night's ``rows`` of ``sids``, of which those ``encoded`` are new, by the artifact in ``folder``; ``whole``: what of all of them is measured
    (:data:`_MEASURED`); ``touched``: the published rows that do not stay; ``baseline``: the day that the tokenizer knows, as ``drift.measure`` gives it; ``drifted``: today
    against the live tokenizer's; ``broken``: items whose vectors are not finite."""

    folder: Path
    manifest: dict[str, Any]
    encoded: DataFrame
    rows: DataFrame
    whole: DataFrame
    touched: DataFrame
    baseline: dict[str, Any]
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
    new = sids.ranked(encoded, manifest["digest"], generations.next_number(lake), kept)
    placed = kept.select("item_id", *_MEASURED).join(night.features.select("item_id", "interactions", "stratum"), "item_id", "left")
    whole = placed.unionByName(encoded.select(placed.columns)).persist()
    drifted = drift.against(known, drift.measure(lake, whole, known["every"], known["edges"]))
    rows = kept.unionByName(new.select(kept.columns))
    return Made(folder, manifest, encoded, rows, whole, touched, known, drifted, broken)


def _anew(night: Night, policy: str, live: Path) -> Made:
    """A new tokenizer, and its SIDs for all items. ``live``: the folder of the live tokenizer's artifact."""
    cfg, lake = night.cfg, night.lake
    folder, manifest = refit.fit(night, policy, live)
    one_of = drift.every(night.features.count(), cfg.retokenize.sample)
    held = night.published, cfg.retokenize.slack
    encoded = sids.encode(night.spark, night.features, folder, manifest, cfg.sids.batch, one_of, held).persist(StorageLevel.DISK_ONLY)
    broken = sids.faults(encoded, manifest)
    rows = sids.ranked(encoded, manifest["digest"], generations.next_number(lake))
    baseline = drift.measure(lake, encoded, one_of)
    drifted = drift.against(night.live["drift"]["baseline"], baseline)
    return Made(folder, manifest, encoded, rows, encoded, night.published, baseline, drifted, broken)


def _error(drifted: dict[str, Any]) -> float:
    """The largest ratio of quantization errors of a modality."""
    return max((ratio["all"] for ratio in drifted["error_ratio"].values() if "all" in ratio), default=1.0)


def _policy(cfg: Config, today: dict[str, Any]) -> str:
    """The policy of the config; under ``auto`` what today's drift asks for."""
    settings, auto = cfg.retokenize, cfg.retokenize.auto
    if settings.policy != "auto":
        return settings.policy
    error = _error(today)
    if error >= auto.refit_error:
        return "refit"
    return "warm" if error >= auto.warm_error or max(today["norms"].values(), default=0.0) >= auto.warm_norms else "frozen"


def _night_gates(cfg: Config, metrics: dict[str, Any], churned: dict[str, Any], error: float, removed: float, unmatched: int) -> list[dict[str, Any]]:
    limits = cfg.retokenize.gates
    values = {
        "items without a SID, or SIDs without an item": (float(unmatched), 0.0),
        "removed": (removed, limits.max_removed),
        "collision rate, tail and cold": (metrics["collision_tail"], limits.max_tail_collision),
        "churn": (churned["churn"], limits.max_churn),
        "churn, weighted by events": (churned["weighted"], limits.max_weighted_churn),
        "error against the tokenizer's data": (error, limits.max_error_ratio),
    }
    return [{"gate": name, "value": value, "threshold": limit, "passed": bool(value <= limit)} for name, (value, limit) in values.items()]


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
    kept = {name: value for name, value in facts.items() if name not in {"metrics", "drift"}}
    write_json(night.cfg.run_dir / _REFUSED, {**kept, "worst": worst})
    pages(night.cfg, night.track)
    text = sids.failures(failed)
    if facts["policy"] != "frozen" and all(gate["gate"].startswith("churn") for gate in failed):
        text += f" (policy {facts['policy']}; to publish without moving SIDs: --set retokenize.policy=frozen; else raise retokenize.gates.max_churn)"
    raise GateError(
        f"night {facts['run_date']} not published: {text}. Generation {night.live['generation']} stays live; worst items: "
        + "; ".join(f"{name}: {', '.join(items[:3])}" for name, items in worst.items() if items)
    )


def _tracked(track: Track, metrics: dict[str, Any], churned: dict[str, Any], today: dict[str, Any], usage: dict[str, float]) -> None:
    values = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    values |= {name: float(churned[name]) for name in ("new", "changed", "removed", "churn", "weighted")}
    values |= {f"norm_index_{m}": value for m, value in today["norms"].items()} | {f"usage_{slot}": value for slot, value in usage.items()}
    values |= {f"error_ratio_{m}": ratio["all"] for m, ratio in today["error_ratio"].items() if "all" in ratio}
    track.metrics(values)
