"""Generate plain rows of items and events, and settings of the checks: most usual, some odd."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np

from tests.fuzz.forms import HOSTILE

START, STEP = 1_600_000_000, 3_600


def chance(rng: Random, percent: int) -> bool:
    """Whether something that happens in so many of 100 examples does."""
    return rng.random() * 100 < percent


def some(rng: Random, rows: int, percent: int, most: int = 3) -> list[int]:
    """A few rows, in so many of 100 examples."""
    if not rows or not chance(rng, percent):
        return []
    return rng.sample(range(rows), rng.randint(1, min(most, rows)))


def pool_of(rng: Random, letter: str, size: int) -> list[Any]:
    """Distinct ids: text, or numbers."""
    if chance(rng, 30):
        return [*range(10_000, 10_000 + size)]
    names: list[Any] = [f"{letter}{i}" for i in range(size)]
    for row, odd in zip(some(rng, size, 50, 6), rng.sample(HOSTILE, 6)):
        names[row] = odd
    return names


def vector(rng: Random, i: int, width: int) -> list[Any]:
    return [round(math.sin(1 + i * 7 + j), 3) for j in range(width)]


_ODD_VECTORS: tuple[Any, ...] = (
    *(
        [],
        None,
        [0.0],
        [math.nan, 1.0],
        [math.inf, 1.0],
        [1.0, -math.inf],
        [1e300, 1.0],
        [None, 1.0],
        [None],
        [0.0, None],
        [1e-300, 0.0],
        [1.0],
        [2.0] * 9,
    ),
    *([0.0, 0.0], [0.0, 0.0, 0.0], [-0.0, 0.0], [65504.0, 1e30], [3.0, 4.0]),
)


def _modality(rng: Random, rows: int, copies: dict[int, int]) -> list[Any]:
    width = rng.randint(1, 4)
    found = [vector(rng, i, width) for i in range(rows)]
    if chance(rng, 25):
        found = [None if rng.random() < 0.5 else vector for vector in found]
    if chance(rng, 10):
        found = [[float(round(x)) for x in vector] if vector else vector for vector in found]
    if chance(rng, 3):
        found = [None] * rows
    for row in some(rng, rows, 35, 4):
        found[row] = rng.choice(_ODD_VECTORS)
    for row, first in copies.items():
        found[row] = found[first] if chance(rng, 80) else found[row]
    return found


def items_of(rng: Random, modalities: Sequence[str], pool: list[Any]) -> list[dict[str, Any]]:
    extra = [rng.randint(0, len(pool) - 1) for _ in some(rng, len(pool), 35)] if pool else []
    names = [*pool, *(pool[i] for i in extra)]
    for row in some(rng, len(names), 8):
        names[row] = None
    copies = {len(pool) + k: i for k, i in enumerate(extra)}
    titles = [f"title {name!r}" if i % 3 else None for i, name in enumerate([*pool, *(pool[i] for i in extra)])]
    columns = {name: _modality(rng, len(names), copies) for name in modalities}
    vectors = [{key: column[i] for key, column in columns.items()} for i in range(len(names))]
    return [{"item_id": name, "title": title, **own} for name, title, own in zip(names, titles, vectors)]


def events_of(rng: Random, items: list[Any], users: list[Any]) -> list[dict[str, Any]]:
    if not items or not users or chance(rng, 2):
        return []
    count = rng.randint(1, 60)
    noise = np.random.default_rng(rng.randrange(2**32))
    moments = rng.choice((1, 3, 1000))  # few moments: many ties
    heavy = chance(rng, 25)
    rows = []
    for k in range(count):
        user = 0 if heavy and k % 2 else int(noise.integers(len(users)))
        item = min(int(noise.zipf(1.5)) - 1, len(items) - 1)
        rows.append(
            {
                "user_id": users[user],
                "item_id": items[item],
                "second": START + STEP * int(noise.integers(moments)),
                "place": k,
            }
        )
    for row in some(rng, count, 20):
        rows[row]["item_id"] = "nowhere" if isinstance(items[0], str | bytes) else 99_999
    for key in ("user_id", "item_id"):
        for row in some(rng, count, 8):
            rows[row][key] = None
    for row in some(rng, count, 30):
        rows.append({**rows[row]})
    return rows


def rate(rng: Random, rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """Give events ratings, labels, or none."""
    names = rng.choice(((), (), ("rating",), ("rating",), ("label",), ("rating", "label")))
    pools: dict[str, tuple[Any, ...]] = {
        "rating": rng.choice(
            (
                (1.0, 3.0, 5.0),
                (1.0, 3.0, 5.0),
                (5.0, 4.0, 4.5),
                (5.0, None, 2.5),
                (None, 5.0),
                (None,),
                (1.0, 2.0),
                (0.0, 1.0),
            )
        ),
        "label": rng.choice(((0.0, 1.0), (1.0, 0.0), (1.0,), (None, 1.0, 0.0), (0.0,))),
    }
    for name in names:
        for i, row in enumerate(rows):
            row[name] = pools[name][(i * 7 + i // 3) % len(pools[name])]
        for row in some(rng, len(rows), 20):
            rows[row][name] = rng.choice((math.nan, math.inf, -math.inf, 0.5, 2.0, -1.0, 1e300, None))
    return names


def order(rng: Random, rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """Give events a time, a place, or both."""
    names = rng.choice((*[("timestamp",)] * 2, ("timestamp", "pos"), ("pos",), ("order",), ("timestamp", "order")))
    for i, row in enumerate(rows):
        row["pos"] = row["place"] if i % 5 else 0
    for row in some(rng, len(rows), 15):
        rows[row]["pos"] = rng.choice((None, -3, 2**40))
    for row in some(rng, len(rows), 15):
        rows[row]["second"] = None
    return names


def features(rng: Random) -> dict[str, Any]:
    """Settings of the checks, most of them usual ones."""
    found: dict[str, Any] = {"max_rejected": rng.choice((0.9, 1.0, 1.0, 1.0, 1.0, 0.5, 0.05, 0.0))}
    choices: dict[str, tuple[Any, ...]] = {
        "deduplicate": ("exact", "pair", "none"),
        "k_core": (0, 1, 2, 3),
        "k_core_rounds": (1, 20),
        "max_length": (50, 60),
        "split": ("leave_one_out", "global_time"),
        "holdout": (0.1, 0.3),
        "ranking_split": ("auto", "same", "global_time"),
        "histories": ("auto", "all", "positive"),
        "max_user_events": (2, 5),
        "first_year": (1, 1970, 2000),
        "now": ("2024-01-01T00:00:00", "2024-01-01T00:00:00+02:00", "2024-01-01", None),
        "positive_rating": (0.0, 4.0),
        "head_share": (0.0, 0.75),
        "tail_share": (0.0,),
    }
    for key in rng.sample(sorted(choices), rng.randint(0, 5)):
        found[key] = rng.choice(choices[key])
    return found


WRONG: tuple[tuple[str, Any], ...] = (
    *(
        ("features.max_rejected", 1.5),
        ("features.k_core", -1),
        ("features.splitt", "same"),
        ("features.now", "yesterday"),
        ("nonsense", 1),
    ),
    *(
        ("features.content", []),
        ("features.content", ["text", "behavior"]),
        ("features.max_length", "many"),
        ("seed", -1),
        ("name", "a/b"),
    ),
    *(
        ("features.holdout", {"a": 1}),
        ("source.kind", "csv"),
        ("source.kind", "amazon"),
        ("features", 3),
        ("pins", {"items": "x"}),
    ),
)
