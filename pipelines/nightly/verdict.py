"""Judge a nightly run's table: derive the facts and gates of its generation from the measurements."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adasid.config import Config
from pipelines import sids
from pipelines.generations import Generation
from pipelines.nightly import changes, drift

MEASURED = ("codes", "weights", "active", "gauges")
"""These columns of ``sids`` are measured, with the item's events and stratum."""


@dataclass(frozen=True)
class Measurements:
    """Measurements describe a new table: its ``tokenizer`` (digest) and the ``folder`` of its artifact; ``metrics``
    (``sids.measure``) and ``churn`` (``changes.churn``); the ``counts`` of its norms and errors in the bins of
    ``baseline``, the tokenizer's training data; ``drifted``: the current items against the live tokenizer's
    (``drift.against``); ``error``: the :func:`largest_error` of the new table; ``distinct``: different items, of which
    ``known`` are among the current ``items``; ``broken``: items with vectors that are not finite."""

    folder: Path
    tokenizer: str
    metrics: dict[str, Any]
    churn: dict[str, Any]
    baseline: dict[str, Any]
    counts: dict[str, drift.Counts]
    drifted: dict[str, Any]
    items: int
    error: float | None
    distinct: int
    known: int
    broken: int


def facts(cfg: Config, live: Generation, version: int, found: Measurements) -> dict[str, Any]:
    """Return the columns of the generation's row that describe the table, gates included. ``version``: of
    ``item_features``."""
    metrics, items = found.metrics, found.items
    usage = drift.usage(live["metrics"], metrics)
    gates = sids.check_gates(metrics, cfg.sids.gates, items, found.distinct, found.broken) + _gates(cfg, found)
    cold = metrics["items_by_stratum"].get("cold", 0) / max(1, items)
    return {
        "inputs": {"item_features": version},
        "tokenizer": found.tokenizer,
        "artifact": str(found.folder),
        "items": metrics["items"],
        "metrics": metrics,
        "gates": gates,
        "churn": found.churn,
        "drift": {**found.drifted, "cold": cold, "usage": usage, "baseline": found.baseline, "counts": found.counts},
    }


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


def _gates(cfg: Config, found: Measurements) -> list[dict[str, Any]]:
    limits, metrics = cfg.retokenize.gates, found.metrics
    values = {
        "items without a SID, or SIDs without an item": (
            float(metrics["items"] - found.known + abs(found.items - found.known)),
            0.0,
        ),
        "collision rate, tail and cold": (metrics["collision_tail"], limits.max_tail_collision),
        "largest group of tail and cold items": (metrics["largest_tail_group"], limits.max_tail_group),
        "error against the tokenizer's data": (found.error, limits.max_error_ratio),
    }
    return changes.gates(cfg, found.churn) + [changes.gate(name, *pair) for name, pair in values.items()]


def tracked(facts: dict[str, Any]) -> dict[str, float]:
    """Return the metrics that MLflow plots over the nightly runs."""
    drifted, churn = facts["drift"], facts["churn"]
    values = {name: value for name, value in facts["metrics"].items() if isinstance(value, (int, float))}
    values |= {name: float(churn[name]) for name in ("new", "changed", "removed", "churn", "weighted")} | {
        "cold": drifted["cold"]
    }
    groups = {
        "churn": churn["by_slot"] | churn["by_stratum"],
        "norm_index": drifted["norms"],
        "usage": drifted["usage"],
    }
    groups |= {f"error_ratio_{m}": ratios for m, ratios in drifted["error_ratio"].items()}
    values |= {f"{group}_{name}": value for group, parts in groups.items() for name, value in parts.items()}
    return values if drifted["spearman"] is None else values | {"spearman": drifted["spearman"]}
