"""Judge a nightly run's table: derive a candidate and its gates from the measurements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adasid.config import Config
from adasid.files import Location
from pipelines.publish import drift
from pipelines.publish.gates import Gate, Metrics, at_most, check_gates, churn_gates
from pipelines.publish.generations import Candidate, Generation
from pipelines.run import Run

MEASURED = ("codes", "weights", "active", "gauges")
"""These columns of ``sids`` are measured, with the item's events and stratum."""


@dataclass(frozen=True)
class Measurements:
    """Measurements describe a new table: its ``tokenizer`` (digest) and the ``folder`` of its artifact; ``metrics``
    (``publish.measure``) and ``churn`` (``publish.churn``); the ``counts`` of its norms and errors in the bins of
    ``baseline``, the tokenizer's training data; ``drifted``: the current items against the live tokenizer's
    (``drift.against``); ``error``: the :func:`largest_error` of the new table; ``distinct``: different items, of which
    ``known`` are among the current ``items``; ``broken``: items with vectors that are not finite."""

    folder: Location
    tokenizer: str
    metrics: Metrics
    churn: Metrics
    baseline: dict[str, Any]
    counts: dict[str, drift.Counts]
    drifted: dict[str, Any]
    items: int
    error: float | None
    distinct: int
    known: int
    broken: int


def candidate(
    cfg: Config, live: Generation, version: int, measured: Measurements, number: int, policy: str, run_date: str
) -> Candidate:
    """Return the generation ``number`` that the measured table may become, gates included. ``version``: of
    ``item_features``."""
    metrics, items = measured.metrics, measured.items
    gates = check_gates(metrics, cfg.sids.gates, items, measured.distinct, measured.broken) + _gates(cfg, measured)
    return Candidate(
        generation=number,
        policy=policy,
        run_date=run_date,
        inputs={"item_features": version},
        tokenizer=measured.tokenizer,
        artifact=Run(cfg).named(measured.folder),
        items=metrics["items"],
        metrics=metrics,
        gates=tuple(gates),
        churn=measured.churn,
        drift={
            **measured.drifted,
            "cold": metrics["items_by_stratum"].get("cold", 0) / max(1, items),
            "usage": drift.usage(live.metrics, metrics),
            "baseline": measured.baseline,
            "counts": measured.counts,
        },
    )


def policy(cfg: Config, drifted: dict[str, Any]) -> str:
    """Return the policy of the config; under ``auto`` the one that the current drift asks for."""
    settings, auto = cfg.retokenize, cfg.retokenize.auto
    if settings.policy != "auto":
        return settings.policy
    error = largest_error(drifted) or 1.0  # without a ratio there is no drift
    if error >= auto.refit_error:
        return "refit"
    return (
        "warm"
        if error >= auto.warm_error or max(drifted["norms"].values(), default=0.0) >= auto.warm_norms
        else "frozen"
    )


def largest_error(drifted: dict[str, Any]) -> float | None:
    """Return the largest ratio of quantization errors of a modality; None where no modality has one."""
    return max((ratio["all"] for ratio in drifted["error_ratio"].values() if "all" in ratio), default=None)


def _gates(cfg: Config, measured: Measurements) -> list[Gate]:
    limits, metrics = cfg.retokenize.gates, measured.metrics
    mismatched = float(metrics["items"] - measured.known + abs(measured.items - measured.known))
    return [
        *churn_gates(cfg, measured.churn),
        at_most("items without a SID, or SIDs without an item", mismatched, 0.0),
        at_most("collision rate, tail and cold", metrics["collision_tail"], limits.max_tail_collision),
        at_most("largest group of tail and cold items", metrics["largest_tail_group"], limits.max_tail_group),
        at_most("error against the tokenizer's data", measured.error, limits.max_error_ratio),
    ]


def tracked(candidate: Candidate) -> dict[str, float]:
    """Return the metrics that MLflow plots over the nightly runs."""
    drifted, churn = candidate.drift, candidate.churn
    values = {name: value for name, value in candidate.metrics.items() if isinstance(value, (int, float))}
    values |= {name: float(churn[name]) for name in ("new", "changed", "removed", "churn", "weighted")}
    values |= {"cold": drifted["cold"]}
    groups = {
        "churn": churn["by_slot"] | churn["by_stratum"],
        "norm_index": drifted["norms"],
        "usage": drifted["usage"],
    }
    groups |= {f"error_ratio_{m}": ratios for m, ratios in drifted["error_ratio"].items()}
    values |= {f"{group}_{name}": value for group, parts in groups.items() for name, value in parts.items()}
    return values if drifted["spearman"] is None else values | {"spearman": drifted["spearman"]}
