"""What a night found, and whether its table may be published."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adasid.config import Config
from pipelines import sids
from pipelines.generations import Generation
from pipelines.nightly import changes, drift

MEASURED = ("codes", "weights", "active", "gauges")
"""What is measured of a row of ``sids``, beside its item's events and stratum."""


@dataclass(frozen=True)
class Measurements:
    """Of a night's table: its ``tokenizer`` (digest) and the ``folder`` of its artifact; ``metrics`` (``sids.measure``)
    and ``churn`` (``changes.churn``); the ``counts`` of its norms and errors in the bins of ``baseline``, which the
    tokenizer knows; how far today has ``drifted`` from the live one (``drift.against``), and the :func:`largest_error`
    of the table's own; ``distinct`` different items, of which ``known`` are among the ``items`` of today; ``broken``
    ones with vectors that are not finite."""

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
    """What the generation's row says of the table, gates and all. ``version``: of ``item_features``."""
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
    """The policy of the config; under ``auto`` what today's drift asks for."""
    settings, auto = cfg.retokenize, cfg.retokenize.auto
    if settings.policy != "auto":
        return settings.policy
    error = largest_error(drifted) or 1.0  # nothing to compare asks for nothing
    if error >= auto.refit_error:
        return "refit"
    return (
        "warm"
        if error >= auto.warm_error or max(drifted["norms"].values(), default=0.0) >= auto.warm_norms
        else "frozen"
    )


def largest_error(drifted: dict[str, Any]) -> float | None:
    """The largest ratio of quantization errors of a modality; None where no modality has one."""
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
    """Of them, what MLflow draws over the nights."""
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
