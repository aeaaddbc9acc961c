"""Check the gates of a table of semantic IDs: limits on its metrics, and on how much it differs from the live one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

from adasid import config
from adasid.report.words import plain

Metrics = dict[str, Any]
"""Metrics of a table or of its churn, by name, as JSON data."""
Number = int | float


class Gate(BaseModel):
    """A gate compares a ``value`` (None: a metric over no items) with a ``threshold``. ``gate``: its name; ``of``: the
    denominator of a share, in words; ``overruled``: the setting that lets a table pass although the gate failed."""

    model_config = ConfigDict(frozen=True)

    gate: str
    value: Number | None
    threshold: Number
    passed: bool
    of: str | None = None
    overruled: str | None = None

    @model_serializer(mode="wrap")
    def _without_absent(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out ``of`` and ``overruled`` where they are None."""
        return {
            name: value for name, value in dump(self).items() if value is not None or name not in {"of", "overruled"}
        }


def at_most(name: str, value: Number | None, limit: Number, of: str | None = None) -> Gate:
    """Return a gate that allows at most ``limit``; it passes where ``value`` is None."""
    return Gate(gate=name, value=value, threshold=limit, passed=value is None or bool(value <= limit), of=of)


def check_gates(metrics: Metrics, limits: config.Gates, expected: int, distinct_items: int, broken: int) -> list[Gate]:
    """Check that every item occurs once, that codebooks are in use and that collisions are bounded."""
    items, utilisation, collisions = metrics["items"], min(metrics["utilisation"]), metrics["collision_items"]
    largest = metrics["largest_group"]
    checks = [
        ("coverage", items / max(1, expected), 1.0, items == expected > 0),
        ("duplicate items", items - distinct_items, 0.0, items == distinct_items),
        ("items with vectors that are not finite", broken, 0.0, not broken),
        ("lowest utilisation", utilisation, limits.min_utilisation, utilisation >= limits.min_utilisation),
        (
            *("collision rate", collisions, limits.max_collision),
            collisions is not None and collisions <= limits.max_collision,
        ),
        ("largest group", largest, limits.max_group, largest <= limits.max_group),
    ]
    return [
        Gate(gate=name, value=value, threshold=threshold, passed=bool(passed))
        for name, value, threshold, passed in checks
    ]


def churn_gates(cfg: config.Config, churn: Metrics) -> list[Gate]:
    """Return the gates on how much a table may differ from the live one. ``churn``: of
    :func:`pipelines.publish.churn.churned`."""
    limits, both = cfg.retokenize.gates, f"{churn['kept']} items of both generations"
    return [
        at_most(
            "removed",
            churn["removed"] / max(1, churn["live"]),
            limits.max_removed,
            of=f"{churn['live']} live items",
        ),
        at_most("churn", churn["churn"], limits.max_churn, of=both),
        at_most(
            "churn, weighted by events",
            churn["weighted"],
            limits.max_weighted_churn,
            of=f"{churn['events']} events of the {both}",
        ),
    ]


def failures(failed: Iterable[Gate]) -> str:
    """Format failed gates as text."""
    return "; ".join(
        f"{gate.gate} is {plain(gate.value)}{f' of {gate.of}' if gate.of is not None else ''}, "
        f"allowed {gate.threshold:.4g}"
        for gate in failed
    )
