"""Write plain rows to files: Parquet, Delta, arrays, Amazon's lines. Each comes with the expected value of every
row."""

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

from tests.fuzz import forms
from tests.fuzz.forms import Column
from tests.fuzz.rows import chance, some, vector

Rows = list[dict[str, Any]]


@dataclass
class Example:
    """A config, the files that it names, and the truth of every row.

    ``refused``: why ingest must end with code 3; ``wrong``: why the config is wrong; ``before``: whether an earlier
    run left tables.
    """

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


@dataclass
class Shape:
    """Which columns the files of a table have, and what is wrong with one of them."""

    odd: str = ""
    present: tuple[str, ...] = ()
    simple: bool = False
    bad_times: list[int] = field(default_factory=list)


def table(rng: Random, rows: Rows, shape: Shape, modalities: Sequence[str]) -> tuple[pa.Table, Rows, list[str]]:
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
        extra = [1 if shape.simple else {"a": [1]}] * len(rows)
        columns["extra"] = Column(pa.array(extra), [None] * len(rows))
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


def stored(rng: Random, example: Example, name: str, rows: Rows, shape: Shape, modalities: Sequence[str] = ()) -> str:
    """Put a table into one file or a folder of several; its path."""
    truths: list[dict[str, Any]] = getattr(example, name)
    if shape.simple:
        content, truth, refused = table(rng, rows, shape, modalities)
        truths += truth
        example.refused += refused
        example.files[f"{name}.delta"] = content
        return f"{name}.delta"
    folder = chance(rng, 35)
    cuts = sorted(rng.randint(0, len(rows)) for _ in range(rng.randint(0, 2))) if folder else []
    parts = [rows[a:b] for a, b in zip([0, *cuts], [*cuts, len(rows)])]
    names = rng.sample(_NAMES, len(parts))
    key = {"items": "item_id", "events": "user_id"}[name]
    for i, (file, part) in enumerate(zip(names, parts)):
        own = Shape(shape.odd, shape.present, False, shape.bad_times if i == 0 else [])
        optional = [column for column in shape.present if column not in {"item_id", "user_id"}]
        if i and optional and chance(rng, 30):
            gone = rng.choice(optional)
            own.present = tuple(column for column in shape.present if column != gone)
        content, truth, refused = table(rng, part, own, modalities)
        whole = f"{name}.parquet/{file}" if folder else f"{name}-{file}"
        value = part[0][key] if part else None
        if (
            folder
            and content.num_columns > 1
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
    noise = rng.choice(
        (
            *[""] * 6,
            "_SUCCESS",
            ".part.crc",
            "_temporary/0/x.parquet",
            "zero.parquet",
            "junk.parquet",
            "junk.csv",
            "rows",
        )
    )
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


def arrays(rng: Random, example: Example, rows: Rows, modalities: Sequence[str], shape: Shape) -> dict[str, str]:
    """A list of ids with one array a modality."""
    plain = all(isinstance(row["item_id"], int | str) and not {*"\n\r\x01"} & {*str(row["item_id"])} for row in rows)
    text = plain and rows and chance(rng, 50)
    if text:
        end = rng.choice(("\n", "\r\n"))
        lines = end.join(str(row["item_id"]) for row in rows) + rng.choice(("", end))
        lines += end if not str(rows[-1]["item_id"]) and not lines.endswith(end) else ""
        example.files["items.txt"] = rng.choice((b"", b"\xef\xbb\xbf")) + lines.encode()
        truth = [{"item_id": str(row["item_id"])} for row in rows]
    else:
        content, truth, refused = table(rng, rows, Shape(shape.odd, ("item_id", "title")), ())
        example.files["items.parquet"] = content
        example.refused += refused
    fault = rng.choice((*[""] * 12, "rows", "ints", "flat", "junk", "pickle")) if rows else ""
    for name in modalities:
        width = rng.randint(1, 4)
        array = np.array([vector(rng, i, width) for i in range(len(rows))], np.float64).reshape(len(rows), width)
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


def amazon(rng: Random, example: Example, items: Rows, rows: Rows) -> dict[str, Any]:
    """Reviews and metadata as JSON lines, in the spellings of the releases."""
    newer = rng.random() < 0.5
    names = ("parent_asin", "user_id", "timestamp", "rating"), ("asin", "reviewerID", "unixReviewTime", "overall")
    product, user, time, rating = names[0 if newer else 1]
    literal = chance(rng, 30)
    lines: dict[str, list[str]] = {"reviews": [], "metadata": []}
    for i, row in enumerate(items):
        name = None if isinstance(row["item_id"], bytes) else row["item_id"]
        record = {
            product: name,
            "title": f"red soap {i % 3}",
            "brand": None,
            "categories": [["a", "b"]],
            "price": 1.5,
        }
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
    return paths
