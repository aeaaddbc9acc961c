"""Run a nightly run: items that changed since the live generation get SIDs under the config's policy, which are
measured, gated, and published or refused."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from functools import partial
from typing import Any

from py4j.protocol import Py4JJavaError
from pyspark import StorageLevel
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from adasid.config import Config, digest
from adasid.errors import GateError, InputError
from adasid.faults import wrapped
from adasid.files import Location, write_json
from adasid.tables import SID_CHANGES, SIDS
from adasid.tokenizers.artifact import Manifest
from pipelines import staleness
from pipelines.engines import spark as engine
from pipelines.engines.lake import Lake
from pipelines.engines.tracking import StageContext
from pipelines.nightly import changes, incremental, refit, verdict
from pipelines.nightly.nightly_run import NightlyRun
from pipelines.nightly.verdict import Measurements
from pipelines.publish import drift, exports, generations
from pipelines.publish.churn import measure_churn, moved
from pipelines.publish.collisions import ranked
from pipelines.publish.encode import encode, faults
from pipelines.publish.gates import failures
from pipelines.publish.generations import Candidate
from pipelines.publish.lease import leased
from pipelines.publish.measure import measure

_WORST = 10
"""At most this many of the worst items of each kind are recorded with a refusal."""


def run(cfg: Config, context: StageContext, run_date: date, dry: bool = False) -> None:
    """Publish the nightly run of ``run_date``, unless nothing changed. ``dry``: measure and judge alone, under the
    lease too, as warm and refit write their tokenizers.

    Raises BusyError while another run is at work, InputError for unusable input, GateError where the new table is
    refused; the live generation then stays as it is.
    """
    lake, settings = context.lake, cfg.retokenize
    with leased(context, settings.lease) as lease:
        live, version = generations.live(lake), lake.version("item_features")
        staleness.check(context, version)
        day, before = run_date.isoformat(), live.run_date
        if before and day < before:
            raise InputError(
                f"run date {day} is before {before}, which generation {live.generation} was published for: give "
                f"{before} or a later one"
            )
        key = digest(
            "night",
            settings.policy,
            settings.slack,
            settings.refit_slack,
            settings.warm,
            settings.auto,
            live.generation,
            live.tokenizer,
            lake.input_hashes({"item_features": version}),
        )
        context.inputs({"item_features": version, "sids": live.sids_version})
        nightly = NightlyRun(cfg, context, lease, live, version, day, key, dry)
        if not dry:
            exports.point(cfg, lake)  # a roll-back or a publication that was killed may not have done this
        read, quiet = live.inputs["item_features"], settings.policy in {"frozen", "auto"}
        if (quiet and version == read) or (day == before and _same(lake, version, read)):
            nightly.unchanged()
            return
        try:
            if not incremental.publish(nightly):
                _publish(nightly)
        except (Py4JJavaError, PySparkException, OSError) as error:
            raise wrapped(
                error,
                f"nightly run of {day}: item_features version {version} or sids version {live.sids_version} cannot "
                f"be processed ({engine.root_cause(error)}); "
                f"generation {generations.pointer(lake)} stays live: mend the table or the disk that it names, then "
                "run it again",
            ) from error


def _same(lake: Lake, version: int, other: int) -> bool:
    """Return whether two versions of ``item_features`` have the same rows, as maintenance leaves them."""
    known = lake.input_hash("item_features", version)
    return version == other or (known is not None and known == lake.input_hash("item_features", other))


def _publish(nightly: NightlyRun) -> None:
    """Detect changes, encode, measure, judge and publish on Spark, for any number of items."""
    cfg, live = nightly.cfg, nightly.live
    folder, (_, manifest) = nightly.artifact, nightly.champion()
    touched, current, how = changes.detect(
        nightly.spark,
        nightly.lake,
        nightly.features,
        nightly.published,
        live.inputs["item_features"],
        nightly.version,
    )
    counts = {row["why"]: row["count"] for row in touched.groupBy("why").count().collect()}
    nightly.note_changes(how, counts)
    if not counts and cfg.retokenize.policy in {"frozen", "auto"}:
        nightly.unchanged()
        return
    try:
        table = _frozen(nightly, folder, manifest, touched, current)
        drifted, policy = table.drifted, verdict.policy(cfg, table.drifted)
        nightly.context.note(f"policy {policy}")
        if policy == "frozen":
            _settle(nightly, table, policy, drifted)
            return
        table.free()
        facts_before = dict(nightly.context.facts)
        try:
            _settle(nightly, _retrained(nightly, policy, folder), policy, drifted)
        except GateError as refusal:
            if cfg.retokenize.policy != "auto" or live.hold:
                raise
            nightly.context.note(f"{refusal}. Policy frozen instead")
            nightly.context.facts = facts_before  # drop the facts of the refused tokenizer
            frozen = _frozen(nightly, folder, manifest, touched, current)
            _settle(nightly, frozen, "frozen", {**drifted, "asked": policy})
    finally:
        touched.unpersist()


def _settle(nightly: NightlyRun, table: NewTable, policy: str, drifted: dict[str, Any]) -> None:
    """Measure and judge the table under ``policy``, and publish it. ``drifted``: the current items against the live
    tokenizer's baseline. Raises GateError."""
    number, input_hash = generations.next_number(nightly.lake), nightly.input_hash(policy, table.manifest.digest)
    moves = (
        moved(table.touched, table.encoded, policy)
        .withColumn("generation", F.lit(number))
        .persist(StorageLevel.DISK_ONLY)
    )
    try:
        measured = _measurements(nightly, table, moves, drifted)
        candidate = verdict.candidate(nightly.cfg, nightly.live, nightly.version, measured, number, policy, nightly.day)
        nightly.track(candidate)
        _judge(nightly, candidate, moves, table.whole)
        nightly.publish(
            candidate,
            table.manifest,
            input_hash,
            partial(
                engine.write,
                table.rows.select([field.name for field in SIDS]),
                nightly.lake,
                "sids",
                SIDS,
                input_hash,
                few=True,
            ),
            partial(
                engine.write,
                moves,
                nightly.lake,
                "sid_changes",
                SID_CHANGES,
                input_hash,
                replace=f"generation = {number}",
            ),
        )
    finally:
        table.free()
        moves.unpersist()


def _measurements(nightly: NightlyRun, table: NewTable, moves: DataFrame, drifted: dict[str, Any]) -> Measurements:
    """Measure the new table. ``drifted``: the current items against the live tokenizer's baseline."""
    metrics = measure(table.whole, nightly.slots(table.manifest))
    distinct, known = _counted(table.whole)
    return Measurements(
        folder=table.folder,
        tokenizer=table.manifest.digest,
        metrics=metrics,
        churn=measure_churn(moves, table.whole, metrics, nightly.live.items),
        baseline=table.baseline,
        counts=table.current["counts"],
        drifted=drifted,
        items=nightly.features.count(),
        error=verdict.largest_error(table.drifted),
        distinct=distinct,
        known=known,
        broken=table.broken,
    )


@dataclass
class NewTable:
    """A new table has ``rows`` of ``sids``, of which those ``encoded`` are new, by the artifact in ``folder``;
    ``whole``: the measured columns of all of them (:data:`verdict.MEASURED`); ``touched``: the published rows that do
    not stay; ``baseline``: the tokenizer's training data, as ``drift.measure`` describes it; ``current``: the current
    items in its bins; ``drifted``: the current items against the live tokenizer's baseline; ``broken``: items whose
    vectors are not finite."""

    folder: Location
    manifest: Manifest
    encoded: DataFrame
    rows: DataFrame
    whole: DataFrame
    touched: DataFrame
    baseline: dict[str, Any]
    current: dict[str, Any]
    drifted: dict[str, Any]
    broken: int

    def free(self) -> None:
        """Unpersist the tables."""
        self.encoded.unpersist()
        self.whole.unpersist()


def _frozen(
    nightly: NightlyRun, folder: Location, manifest: Manifest, touched_items: DataFrame, features: DataFrame
) -> NewTable:
    """Encode the items in ``touched_items``, whose current rows are ``features``, with the live tokenizer; all others
    retain their published SIDs."""
    baseline, lake = nightly.live.drift["baseline"], nightly.lake
    touched = nightly.published.join(touched_items, "item_id", "left_semi")
    previous = touched, nightly.cfg.retokenize.slack
    encoded = encode(
        nightly.spark, features, folder, manifest, nightly.cfg.sids.batch, baseline["every"], previous
    ).persist(StorageLevel.DISK_ONLY)
    broken = faults(encoded, manifest)
    untouched = nightly.published.join(touched_items, "item_id", "left_anti")
    new = ranked(encoded, manifest.digest, generations.next_number(lake), untouched, touched)
    measured = untouched.select("item_id", *verdict.MEASURED).join(
        nightly.features.select("item_id", "interactions", "stratum"), "item_id", "left"
    )
    whole = measured.unionByName(encoded.select(measured.columns)).persist()
    current = drift.measure(lake, whole, baseline["every"], baseline["edges"])
    rows, drifted = untouched.unionByName(new.select(untouched.columns)), drift.against(baseline, current)
    return NewTable(folder, manifest, encoded, rows, whole, touched, baseline, current, drifted, broken)


def _retrained(nightly: NightlyRun, policy: str, live: Location) -> NewTable:
    """Train a new tokenizer and encode all items with it. ``live``: the folder of the live tokenizer's artifact."""
    cfg, lake = nightly.cfg, nightly.lake
    folder, manifest = refit.fit(nightly, policy, live)
    stride = drift.sampling_stride(nightly.features.count(), cfg.retokenize.sample)
    previous = nightly.published, cfg.retokenize.slack
    encoded = encode(nightly.spark, nightly.features, folder, manifest, cfg.sids.batch, stride, previous).persist(
        StorageLevel.DISK_ONLY
    )
    broken = faults(encoded, manifest)
    rows = ranked(encoded, manifest.digest, generations.next_number(lake), before=nightly.published)
    baseline = drift.measure(lake, encoded, stride)
    drifted = drift.against(nightly.live.drift["baseline"], baseline)
    return NewTable(folder, manifest, encoded, rows, encoded, nightly.published, baseline, baseline, drifted, broken)


def _counted(whole: DataFrame) -> tuple[int, int]:
    """Count the different items of a table, and its rows of items that currently exist."""
    row = whole.agg(F.countDistinct("item_id").alias("distinct"), F.count("stratum").alias("known")).first()
    return (int(row["distinct"]), int(row["known"])) if row else (0, 0)


def _judge(nightly: NightlyRun, candidate: Candidate, moves: DataFrame, whole: DataFrame) -> None:
    """Raise GateError where a gate failed, with the worst items; the refusal is recorded for the report."""
    failed = [gate for gate in candidate.gates if not gate.passed]
    if not failed:
        return
    largest_groups = (
        whole.groupBy("codes")
        .agg(F.count("*").alias("n"), F.min("item_id").alias("item_id"))
        .orderBy(F.desc("n"), "item_id")
        .limit(_WORST)
    )
    churned = moves.filter("old_codes IS NOT NULL AND new_codes IS NOT NULL").join(
        whole.select("item_id", "interactions"), "item_id"
    )
    worst = {
        "most moved, by events": [
            row["item_id"] for row in churned.orderBy(F.desc("interactions"), "item_id").limit(_WORST).collect()
        ],
        "of the largest groups": [f"{row['item_id']} ({row['n']})" for row in largest_groups.collect()],
    }
    gates = candidate.model_dump(include={"gates"})
    nightly.context.document("refused.json", {**gates, "worst": worst})
    if not nightly.dry:
        write_json(nightly.refused, {**candidate.model_dump(exclude={"metrics", "drift"}), "worst": worst})
        nightly.pages()
    text = failures(failed)
    if candidate.policy != "frozen" and all(gate.gate.startswith("churn") for gate in failed):
        text += (
            f" (policy {candidate.policy}; to publish without moving SIDs: --set retokenize.policy=frozen; else "
            "raise retokenize.gates.max_churn)"
        )
    text = f"{'dry run: ' if nightly.dry else ''}nightly run of {candidate.run_date} not published: {text}"
    raise GateError(
        f"{text}. Generation {nightly.live.generation} stays live; worst items: "
        + "; ".join(f"{name}: {', '.join(items[:3])}" for name, items in worst.items() if items)
    )
