"""Examples: plain rows first, then files of many kinds that hold them, and a config that reads them."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import write_deltalake
from hypothesis import strategies as st

from tests.fuzz import forms
from tests.fuzz.forms import Column

START, STEP = 1_600_000_000, 3_600


@dataclass
class Example:
    """A config, the files that it names, and the truth of every row. ``refused``: why ingest must end with code 3; ``wrong``: why the config is wrong."""

    seed: int
    config: dict[str, Any]
    files: dict[str, Any] = field(default_factory=dict)
    items: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    unparsable: dict[str, int] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    wrong: str = ""
    before: bool = False

    def write(self, folder: Path) -> None:
        """Write the files below ``folder``."""
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif isinstance(content, np.ndarray):
                np.save(path, content)
            elif name.endswith(".delta"):
                write_deltalake(str(path), content)
            else:
                pq.write_table(content, path, row_group_size=max(len(content) // 3, 1))


def chance(rng: Random, percent: int) -> bool:
    """Whether something that happens in so many of 100 examples does."""
    return rng.random() * 100 < percent


def some(rng: Random, rows: int, percent: int, most: int = 3) -> list[int]:
    """A few rows, in so many of 100 examples."""
    if not rows or not chance(rng, percent):
        return []
    return rng.sample(range(rows), rng.randint(1, min(most, rows)))


def _pool(rng: Random, letter: str, size: int) -> list[Any]:
    """Distinct ids: text, or numbers."""
    if chance(rng, 30):
        return [*range(10_000, 10_000 + size)]
    names: list[Any] = [f"{letter}{i}" for i in range(size)]
    for row, odd in zip(some(rng, size, 50, 6), rng.sample(forms.HOSTILE, 6)):
        names[row] = odd
    return names


def _vector(rng: Random, i: int, width: int) -> list[Any]:
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
    found = [_vector(rng, i, width) for i in range(rows)]
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


def _items(rng: Random, modalities: Sequence[str], pool: list[Any]) -> list[dict[str, Any]]:
    extra = [rng.randint(0, len(pool) - 1) for _ in some(rng, len(pool), 35)] if pool else []
    names = [*pool, *(pool[i] for i in extra)]
    for row in some(rng, len(names), 8):
        names[row] = None
    copies = {len(pool) + k: i for k, i in enumerate(extra)}
    titles = [f"title {name!r}" if i % 3 else None for i, name in enumerate([*pool, *(pool[i] for i in extra)])]
    columns = {name: _modality(rng, len(names), copies) for name in modalities}
    return [{"item_id": name, "title": titles[i], **{key: column[i] for key, column in columns.items()}} for i, name in enumerate(names)]


def _events(rng: Random, items: list[Any], users: list[Any]) -> list[dict[str, Any]]:
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
        rows.append({"user_id": users[user], "item_id": items[item], "second": START + STEP * int(noise.integers(moments)), "place": k})
    for row in some(rng, count, 20):
        rows[row]["item_id"] = "nowhere" if isinstance(items[0], str | bytes) else 99_999
    for key in ("user_id", "item_id"):
        for row in some(rng, count, 8):
            rows[row][key] = None
    for row in some(rng, count, 30):
        rows.append({**rows[row]})
    return rows


@dataclass
class _Shape:
    """Which columns the files of a table have, and what is wrong with one of them."""

    odd: str = ""
    present: tuple[str, ...] = ()
    simple: bool = False
    bad_times: list[int] = field(default_factory=list)


def _table(rng: Random, rows: list[dict[str, Any]], shape: _Shape, modalities: Sequence[str]) -> tuple[pa.Table, list[dict[str, Any]], list[str]]:
    """A file with ``rows`` in forms of its own, the truth of each, and why it must be refused."""
    columns: dict[str, Column] = {}
    for name in shape.present:
        key = {"order": "pos"}.get(name, name)
        values, odd = [row.get(key) for row in rows], shape.odd == name
        if name in {"item_id", "user_id"}:
            columns[name] = forms.ids(rng, values, odd, shape.simple)
        elif name in modalities:
            columns[name] = forms.vectors(rng, values, odd, shape.simple)
        elif name == "timestamp":
            special = [row for row in shape.bad_times if row < len(rows)]
            columns[name] = forms.times(rng, [row["second"] for row in rows], odd, shape.simple, special)
        elif name in {"pos", "order"}:
            columns[name] = forms.positions(rng, values, odd, shape.simple)
        elif name in {"rating", "label"}:
            columns[name] = forms.numbers(rng, values, odd, shape.simple)
        else:
            columns[name] = Column(pa.array(values, pa.string()), values)
    if chance(rng, 20):
        columns["extra"] = Column(pa.array([{"a": [1]}] * len(rows)) if not shape.simple else pa.array([1] * len(rows)), [None] * len(rows))
    order = rng.sample(sorted(columns), len(columns))
    truth = [{name: column.truth[i] for name, column in columns.items()} for i in range(len(rows))]
    for row in truth:
        row.update({"pos": row.get("pos") if "pos" in columns else row.get("order"), "time": row.get("timestamp")})
        row.update(_numbers(columns, row))
    table = pa.table([columns[name].array for name in order], names=list(order))
    return table, truth, [column.refused for column in columns.values() if column.refused]


def _numbers(columns: dict[str, Column], row: dict[str, Any]) -> dict[str, Any]:
    """A boolean rating is a label where there is no label."""
    rating, label = row.get("rating"), row.get("label")
    if "rating" in columns and pa.types.is_boolean(columns["rating"].array.type):
        return {"rating": None, "label": label if "label" in columns else rating}
    return {"rating": rating, "label": label}


_NAMES = (
    "part-0.parquet",
    "a b.parquet",
    "items[v2].parquet",
    "50%.parquet",
    "x#y?.parquet",
    "a:b.parquet",
    "\u00fc\u65e5.parquet",
    "{a,b}*.parquet",
    "sub/p.parquet",
)


def _stored(rng: Random, example: Example, name: str, rows: list[dict[str, Any]], shape: _Shape, modalities: Sequence[str]) -> str:
    """Put a table into one file or a folder of several; its path."""
    truths: list[dict[str, Any]] = getattr(example, name)
    if shape.simple:
        content, truth, refused = _table(rng, rows, shape, modalities)
        truths += truth
        example.refused += refused
        example.files[f"{name}.delta"] = content
        return f"{name}.delta"
    folder = chance(rng, 35)
    cuts = sorted(rng.randint(0, len(rows)) for _ in range(rng.randint(0, 2))) if folder else []
    parts = [rows[a:b] for a, b in zip([0, *cuts], [*cuts, len(rows)])]
    names = rng.sample(_NAMES, len(parts))
    key = {"items": "item_id", "interactions": "user_id"}[{"events": "interactions"}.get(name, name)]
    for i, (file, part) in enumerate(zip(names, parts)):
        own = _Shape(shape.odd, shape.present, False, shape.bad_times if i == 0 else [])
        optional = [column for column in shape.present if column not in {"item_id", "user_id"}]
        if i and optional and chance(rng, 30):
            gone = rng.choice(optional)
            own.present = tuple(column for column in shape.present if column != gone)
        content, truth, refused = _table(rng, part, own, modalities)
        whole = f"{name}.parquet/{file}" if folder else f"{name}-{file}"
        value = part[0][key] if part else None
        if (
            folder
            and isinstance(value, str)
            and value.strip("_ ")
            and value[:2] != "__"
            and len(value) < 99
            and all(row[key] == value for row in part)
            and shape.odd != key
        ):
            content, whole = content.drop_columns([key]), f"{name}.parquet/{key}={quote(value, safe='')}/p{i}.parquet"
        truths += truth
        example.refused += refused
        example.files[whole] = content
    if not folder:
        return next(file for file in example.files if file.startswith(f"{name}-"))
    noise = rng.choice((*[""] * 6, "_SUCCESS", ".part.crc", "_temporary/0/x.parquet", "zero.parquet", "junk.parquet", "junk.csv", "rows"))
    if noise == "rows":
        example.files[f"{name}.parquet/none.parquet"] = next(
            c for f, c in example.files.items() if f.startswith(f"{name}.parquet/") and isinstance(c, pa.Table)
        ).slice(0, 0)
        if "=" in next(iter(f for f in example.files if f.startswith(f"{name}.parquet/"))):
            example.files.pop(f"{name}.parquet/none.parquet")
    elif noise:
        example.files[f"{name}.parquet/{noise}"] = b"" if noise in {"_SUCCESS", "zero.parquet"} else b"not parquet"
        example.refused += [noise] if noise in {"zero.parquet", "junk.parquet", "junk.csv"} else []
    return f"{name}.parquet"


def _rated(rng: Random, rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """Give events ratings, labels, or none."""
    names = rng.choice(((), (), ("rating",), ("rating",), ("label",), ("rating", "label")))
    pools: dict[str, tuple[Any, ...]] = {
        "rating": rng.choice(((1.0, 3.0, 5.0), (1.0, 3.0, 5.0), (5.0, 4.0, 4.5), (5.0, None, 2.5), (None, 5.0), (None,), (1.0, 2.0), (0.0, 1.0))),
        "label": rng.choice(((0.0, 1.0), (1.0, 0.0), (1.0,), (None, 1.0, 0.0), (0.0,))),
    }
    for name in names:
        for i, row in enumerate(rows):
            row[name] = pools[name][(i * 7 + i // 3) % len(pools[name])]
        for row in some(rng, len(rows), 20):
            rows[row][name] = rng.choice((math.nan, math.inf, -math.inf, 0.5, 2.0, -1.0, 1e300, None))
    return names


def _ordered(rng: Random, rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """Give events a time, a place, or both."""
    names = rng.choice((("timestamp",), ("timestamp",), ("timestamp", "pos"), ("pos",), ("order",), ("timestamp", "order")))
    for i, row in enumerate(rows):
        row["pos"] = row["place"] if i % 5 else 0
    for row in some(rng, len(rows), 15):
        rows[row]["pos"] = rng.choice((None, -3, 2**40))
    for row in some(rng, len(rows), 15):
        rows[row]["second"] = None
    return names


def _features(rng: Random) -> dict[str, Any]:
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


_WRONG: tuple[tuple[str, Any], ...] = (
    *(("features.max_rejected", 1.5), ("features.k_core", -1), ("features.splitt", "same"), ("features.now", "yesterday"), ("nonsense", 1)),
    *(("features.content", []), ("features.content", ["text", "behavior"]), ("features.max_length", "many"), ("seed", -1), ("name", "a/b")),
    *(("features.holdout", {"a": 1}), ("source.kind", "csv"), ("source.kind", "amazon"), ("features", 3), ("pins", {"items": "x"})),
)


def _mistaken(rng: Random, example: Example) -> None:
    key, value = rng.choice(_WRONG)
    node, (*parents, last) = example.config, key.split(".")
    for parent in parents:
        node[parent] = node = dict(node[parent])
    node[last] = value
    example.wrong = f"{key}: {value}"


def _arrays(rng: Random, example: Example, rows: list[dict[str, Any]], modalities: Sequence[str], shape: _Shape) -> dict[str, str]:
    """A list of ids with one array a modality."""
    plain = [name for name in (row["item_id"] for row in rows) if isinstance(name, int) or (isinstance(name, str) and not {*"\n\r\x01"} & {*name})]
    text = len(plain) == len(rows) and rows and chance(rng, 50)
    if text:
        end = rng.choice(("\n", "\r\n"))
        lines = end.join(str(row["item_id"]) for row in rows) + rng.choice(("", end))
        lines += end if not str(rows[-1]["item_id"]) and not lines.endswith(end) else ""
        example.files["items.txt"] = rng.choice((b"", b"\xef\xbb\xbf")) + lines.encode()
        truth = [{"item_id": str(row["item_id"])} for row in rows]
    else:
        content, truth, refused = _table(rng, rows, _Shape(shape.odd, ("item_id", "title")), ())
        example.files["items.parquet"] = content
        example.refused += refused
    if not rows:
        example.refused.append("no rows")
    fault = rng.choice((*[""] * 12, "rows", "ints", "flat", "junk", "pickle")) if rows else ""
    for name in modalities:
        width = rng.randint(1, 4)
        array = np.array([_vector(rng, i, width) for i in range(len(rows))], np.float64).reshape(len(rows), width)
        for row in some(rng, len(rows), 30):
            array[row] = rng.choice((0.0, math.nan, math.inf, 1e30))
        kind = rng.choice((np.float16, np.float32, np.float64, np.dtype(">f4")))
        with np.errstate(over="ignore"):
            typed = array.astype(kind)
            for row, values in zip(truth, typed.astype(np.float32).tolist()):
                row[name] = values
        typed = np.asfortranarray(typed) if chance(rng, 20) else typed
        example.files[f"{name}.npy"] = {
            "rows": typed[1:],
            "ints": np.ones((len(rows), 2), np.int64),
            "flat": typed[:, 0],
            "junk": b"junk",
            "pickle": b"\x80\x04.",
        }.get(fault, typed)
    example.refused += [f"array: {fault}"] if fault else []
    example.items += truth
    return {"items": "items.txt" if text else "items.parquet"}


def _amazon(rng: Random, example: Example, items: list[dict[str, Any]], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Reviews and metadata as JSON lines, in the spellings of the releases."""
    newer = rng.random() < 0.5
    product, user, time, rating = ("parent_asin", "user_id", "timestamp", "rating") if newer else ("asin", "reviewerID", "unixReviewTime", "overall")
    literal = chance(rng, 30)
    lines: dict[str, list[str]] = {"reviews": [], "metadata": []}
    for i, row in enumerate(items):
        name = None if isinstance(row["item_id"], bytes) else row["item_id"]
        record = {product: name, "title": f"red soap {i % 3}", "brand": None, "categories": [["a", "b"]], "price": 1.5}
        lines["metadata"].append(repr(record) if literal else json.dumps(record, ensure_ascii=rng.random() < 0.5))
        example.items.append({"item_id": None if name is None else str(name)})
    for row in rows:
        who, what = (None if isinstance(row[key], bytes) else row[key] for key in ("user_id", "item_id"))
        moment = None if row["second"] is None else row["second"] * (1000 if newer else 1)
        lines["reviews"].append(json.dumps({user: who, product: what, time: moment, rating: 5.0}))
        truth = {
            "user_id": None if who is None else str(who),
            "item_id": None if what is None else str(what),
            "pos": None,
            "rating": 5.0,
            "label": None,
        }
        example.events.append({**truth, "time": None if moment is None else row["second"]})
    for name, written in lines.items():
        table = {"reviews": "interactions", "metadata": "items"}[name]
        usable = any(
            row["item_id"] is not None and (name == "metadata" or row["user_id"] is not None)
            for row in (example.items if name == "metadata" else example.events)
        )
        example.refused += [] if usable else [f"{name} has no line"]
        for at in some(rng, len(written) + 1, 20):
            written.insert(at, rng.choice(("", '{"asin": "B9", "title": "cut of', "not json", "{'asin': open('x')}")))
            example.unparsable[table] = example.unparsable.get(table, 0) + (written[at] != "")
        end = rng.choice(("\n", "\n", "\r\n"))
        content = rng.choice((b"", b"", b"\xef\xbb\xbf")) + (end.join(written) + end).encode()
        form = rng.choice((*[""] * 8, "array", "cut"))
        if form == "array":
            content = b"[" + b",".join(line.encode() for line in written) + b"]"
        zipped = form == "cut" or chance(rng, 40)
        content = gzip.compress(content, mtime=0) if zipped else content
        content = content[: len(content) // 2] if form == "cut" else content
        example.refused += [f"{name}: {form}"] if form else []
        example.files[f"{name}.json{'.gz' if zipped else ''}"] = content
    paths = {name: next(file for file in example.files if file.startswith(name)) for name in lines}
    return {**paths, "text_width": 2, "min_word_count": 1}


def make(seed: int) -> Example:
    """One example, sound or with a few faults."""
    rng = Random(seed)
    kind = rng.choice((*["parquet"] * 13, "delta", "delta", "arrays", "arrays", "arrays", "amazon", "amazon"))
    content = ["text"] if kind == "amazon" or chance(rng, 70) else ["text", "visual"]
    column = kind != "amazon" and chance(rng, 20)
    modalities = [*content, *(["behavior"] if column else [])]
    pool = _pool(rng, "i", rng.randint(1, 40) if not chance(rng, 3) else 0)
    if kind == "delta":
        pool = [name for name in pool if not isinstance(name, bytes)]
    users = [name for name in _pool(rng, "u", rng.randint(1, 20)) if not (isinstance(name, bytes) and kind == "delta")]
    items, events = _items(rng, modalities, pool), _events(rng, pool, users)
    features = {**_features(rng), "content": content}
    example = Example(seed, {"features": features, "behavior": {"source": "column"} if column else {}}, before=rng.random() < 0.5)
    if chance(rng, 10):
        example.config["tokenizer"] = {"name": "quasid"}
    present = ("user_id", "item_id", *_ordered(rng, events), *_rated(rng, events))
    odd = rng.choice((*[""] * 40, *present, "item_id", *modalities))
    simple = kind == "delta"
    shape = _Shape(odd, present, simple, some(rng, len(events), 30, 4))
    if kind == "amazon":
        example.config["source"] = {"kind": kind, kind: _amazon(rng, example, items, events)}
    else:
        own = _Shape(odd, ("item_id", *(["title"] if rng.random() < 0.5 else []), *modalities), simple)
        if kind == "arrays":
            section: dict[str, Any] = {"folder": ".", **_arrays(rng, example, items, modalities, own)}
            section["embeddings"] = {name: f"{name}.npy" for name in modalities}
        else:
            section = {"items": _stored(rng, example, "items", items, own, modalities), "format": kind}
        section["interactions"] = _stored(rng, example, "events", events, _Shape(odd, present, simple, shape.bad_times), ())
        example.config["source"] = {"kind": "arrays", "arrays": section} if kind == "arrays" else {"kind": "tables", "tables": section}
    if chance(rng, 5):
        _mistaken(rng, example)
    return example


examples = st.integers(0, 2**32 - 1).map(make)
"""A seed makes an example: of smaller parts hypothesis would make many that are nearly alike."""
