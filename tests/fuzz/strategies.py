"""Generate examples: plain rows first, then files of many kinds with those rows, and a config that reads them."""

from __future__ import annotations

from random import Random
from typing import Any

from hypothesis import strategies as st

from tests.fuzz import rows, sources
from tests.fuzz.rows import chance, some
from tests.fuzz.sources import Example, Shape


def _mistaken(rng: Random, example: Example) -> None:
    key, value = rng.choice(rows.WRONG)
    node, (*parents, last) = example.config, key.split(".")
    for parent in parents:
        node[parent] = node = dict(node[parent])
    node[last] = value
    example.wrong = f"{key}: {value}"


def make(seed: int) -> Example:
    """One example, sound or with a few faults."""
    rng = Random(seed)
    kind = rng.choice((*["parquet"] * 13, "delta", "delta", "arrays", "arrays", "arrays", "amazon", "amazon"))
    content = ["text"] if kind == "amazon" or chance(rng, 70) else ["text", "visual"]
    column = kind != "amazon" and chance(rng, 20)
    modalities = [*content, *(["behavior"] if column else [])]
    pool = rows.pool_of(rng, "i", rng.randint(1, 40) if not chance(rng, 3) else 0)
    users = rows.pool_of(rng, "u", rng.randint(1, 20))
    if kind == "delta":
        pool, users = ([name for name in names if not isinstance(name, bytes)] for names in (pool, users))
    items, events = rows.items_of(rng, modalities, pool), rows.events_of(rng, pool, users)
    features = {**rows.features(rng), "content": content}
    config = {"features": features, "behavior": {"source": "column"} if column else {}}
    example = Example(seed, config, before=rng.random() < 0.5)
    if chance(rng, 10):
        example.config["tokenizer"] = {"name": "quasid"}
    present = ("user_id", "item_id", *rows.order(rng, events), *rows.rate(rng, events))
    odd = rng.choice((*[""] * 40, *present, "item_id", *modalities))
    simple = kind == "delta"
    shape = Shape(odd, present, simple, some(rng, len(events), 30, 4))
    if kind == "amazon":
        example.config["source"] = {"kind": kind, kind: sources.amazon(rng, example, items, events)}
    else:
        own = Shape(odd, ("item_id", *(["title"] if rng.random() < 0.5 else []), *modalities), simple)
        if kind == "arrays":
            section: dict[str, Any] = {"folder": ".", **sources.arrays(rng, example, items, modalities, own)}
            section["embeddings"] = {name: f"{name}.npy" for name in modalities}
        else:
            section = {"items": sources.stored(rng, example, "items", items, own, modalities), "format": kind}
        section["interactions"] = sources.stored(rng, example, "events", events, shape)
        reader = "arrays" if kind == "arrays" else "tables"
        example.config["source"] = {"kind": reader, reader: section}
    if chance(rng, 5):
        _mistaken(rng, example)
    return example


examples = st.integers(0, 2**32 - 1).map(make)
"""A seed makes an example: of smaller parts hypothesis would make many that are nearly alike."""
