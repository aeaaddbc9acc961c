"""Build columns of a source in all their physical forms, each with the values that the lake must contain."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

BROKEN = "broken"
"""The truth of a time that cannot be parsed."""

HOSTILE = (
    *("", " ", "\u00a0\u3000", "a\nb", "a\u2028b", "a\tb", "\x00", "a\x7fb", "a\u0085b", "a\rb"),
    *(
        "caf\u00e9",
        "cafe\u0301",
        "a ",
        " a",
        "a",
        "A",
        "'",
        '"',
        "`",
        ",",
        "\\",
        "a/b",
        "..",
        "%20",
        "#",
        "$x",
        "{}",
        "[0]",
        "--",
    ),
    *(
        "\U0001f600",
        "\u65e5\u672c",
        "\ufeffa",
        "\u200b",
        "null",
        "None",
        "NaN",
        "true",
        "1e3",
        "1.0",
        "-0",
        "00001",
        "1",
        "1 ",
    ),
    *(
        "__HIVE_DEFAULT_PARTITION__",
        "<script>alert(1)</script>",
        "'; DROP TABLE items; --",
        "x" * 5000,
        b"\xff\xfe",
        b"a\xc3",
    ),
)
"""Ids of text. Bytes stand for text that is not UTF-8."""

NUMBERS = (0, -1, 7, 2**53, 2**53 + 1, 2**63 - 1, -(2**63))


class Column(NamedTuple):
    """``array`` as a file holds it; ``truth`` of every row; ``refused``: why the whole table cannot be read."""

    array: pa.Array
    truth: list[Any]
    refused: str = ""


def _text(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    raw = pa.array([value.encode() if isinstance(value, str) else value for value in values], pa.binary())
    if any(isinstance(value, bytes) for value in values):
        return raw.view(pa.string())
    return raw.cast(pa.string()).cast(kind)


_TEXT = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
    "string_view": pa.string_view(),
}
_WHOLE = {
    "int8": pa.int8(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "uint64": pa.uint64(),
    "decimal": pa.decimal128(38, 0),
}
_NO_ID: dict[str, tuple[pa.DataType, Callable[[int], Any]]] = {
    "double": (pa.float64(), float),
    "float": (pa.float32(), float),
    "bool": (pa.bool_(), lambda i: i % 2 == 0),
    "binary": (pa.binary(), lambda i: b"%d" % i),
    "uuid": (pa.uuid(), lambda i: uuid.UUID(int=i).bytes),
    "list": (pa.list_(pa.string()), lambda i: [str(i)]),
    "struct": (pa.struct([("id", pa.int64())]), lambda i: {"id": i}),
    "date": (pa.date32(), int),
    "timestamp": (pa.timestamp("us"), int),
    "decimal_fraction": (pa.decimal128(20, 2), Decimal),
}
DELTA = {"string", "int32", "int64", "double", "bool", "binary", "list", "f32", "f64", "s", "ms", "iso", "us utc"}
"""Forms that delta-rs writes."""


def _fits(kind: pa.DataType, values: Sequence[Any]) -> bool:
    low, high = (-(2**63), 2**64 - 1) if not pa.types.is_integer(kind) else _limits(kind)
    return all(value is None or low <= value <= high for value in values)


def _limits(kind: pa.DataType) -> tuple[int, int]:
    info = np.iinfo(kind.to_pandas_dtype())
    return int(info.min), int(info.max)


def ids(rng: Random, values: Sequence[Any], odd: bool, simple: bool) -> Column:
    """Ids as text or integers; ``odd``: of a type that is no id's."""
    if odd:
        name = rng.choice([name for name in _NO_ID if not simple or name in DELTA])
        kind, make = _NO_ID[name]
        return Column(
            pa.array([None if value is None else make(i) for i, value in enumerate(values)], kind),
            [None] * len(values),
            f"ids of {name}",
        )
    truth = [value if value is None or isinstance(value, bytes) else str(value) for value in values]
    whole = any(isinstance(value, int) for value in values)
    forms = {**_TEXT, **{name: kind for name, kind in _WHOLE.items() if whole and _fits(kind, values)}}
    if values and all(value is None for value in values):
        forms["null"] = pa.null()
    name = rng.choice([name for name in forms if not simple or name in DELTA])
    if name in _TEXT:
        return Column(_text(truth, _TEXT[name]), truth)
    return Column(pa.array(values, forms[name]), truth)


def _number(value: Any) -> Any:
    """The seconds that a number means, by its size, as the README says."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else BROKEN
    exact = Fraction(value)
    for most, unit in ((10**11, 1), (10**14, 10**3), (10**17, 10**6), (9 * 10**18, 10**9)):
        if abs(exact) <= most:
            return exact / unit if exact / unit >= _YEAR_1 else BROKEN
    return BROKEN


_FUTURE, _YEAR_1, _LAST = 4_102_444_800, -62_135_596_800, 253_402_300_799
_INTEGERS = (0, -5, 2020, 20200913, _FUTURE, 2**31, 10**18, 2**62, 2**63 - 1, -(2**63), 10**11, 10**11 + 1)
_WORDS = {
    **{
        text: BROKEN
        for text in (
            "yesterday",
            "13/09/2020",
            "NaN",
            "inf",
            "2020-02-30",
            "2020-13-01",
            "1,600,000,000",
            "12:00",
            "0x10",
            "9" * 40,
        )
    },
    **{"": None, "   ": None, "0001-01-01": Fraction(_YEAR_1), "9999-12-31T23:59:59Z": Fraction(_LAST)},
    **{text: Fraction(text) for text in ("0", "2020", "20200913", "1600000000.5", "1.6e9")},
    **{text: Fraction(text) for text in ("+1600000000", " 1600000000 ", "-1")},
    **{"1600000000123": Fraction(1600000000123, 1000), "1600000000123456789": Fraction(1600000000123456789, 10**9)},
    **{
        "2020-09-13T12:26:40+05:30": Fraction(1599980200),
        "2020-09-13 12:26:40": Fraction(1600000000),
        "2020-09-13": Fraction(1599955200),
    },
}
_NO_TIME: dict[str, tuple[pa.DataType, Any]] = {
    "float32": (pa.float32(), 1.0),
    "bool": (pa.bool_(), True),
    "list": (pa.list_(pa.int64()), [1]),
    "binary": (pa.binary(), b"1"),
    "time": (pa.time64("us"), 1),
    "duration": (pa.duration("s"), 1),
}
_UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def _iso(second: int) -> str:
    return f"{np.datetime64(second, 's')}Z"


_STAMPS = tuple(f"{unit} {zone}" for unit in _UNITS for zone in ("naive", "utc", "Asia/Kolkata", "America/New_York"))
_DAYS = {"date32": pa.date32(), "date64": pa.date64(), "i32": pa.int32()}


def times(rng: Random, seconds: Sequence[int | None], odd: bool, simple: bool, special: Sequence[int]) -> Column:
    """Times; rows in ``special`` get a value that is no common time. ``odd``: of a type that is no time's."""
    if odd:
        name = rng.choice([name for name in _NO_TIME if not simple or name in DELTA])
        kind, value = _NO_TIME[name]
        array = pa.array([None if second is None else value for second in seconds], kind)
        return Column(array, [None] * len(seconds), f"times of {name}")
    makers = {
        **dict.fromkeys((*_UNITS, "u64"), _whole_times),
        **dict.fromkeys(("double", "decimal"), _fractions),
        **dict.fromkeys(("iso", "text", "dictionary"), _text_times),
        **dict.fromkeys(_DAYS, _dates),
        **dict.fromkeys(_STAMPS, _stamps),
    }
    name = rng.choice([name for name in makers if not simple or name in DELTA])
    return makers[name](rng, name, seconds, special)


def _whole_times(rng: Random, name: str, seconds: Sequence[int | None], special: Sequence[int]) -> Column:
    factor = _UNITS.get(name, 1)
    values = [None if second is None else second * factor for second in seconds]
    truth = [None if second is None else Fraction(second) for second in seconds]
    for row in special:
        values[row] = rng.choice(_INTEGERS if name != "u64" else [2**64 - 1, 0])
        truth[row] = _number(values[row])
    return Column(pa.array(values, pa.uint64() if name == "u64" else pa.int64()), truth)


def _fractions(rng: Random, name: str, seconds: Sequence[int | None], special: Sequence[int]) -> Column:
    odd = [math.nan, math.inf, -math.inf, 0.0, 1.6e12, 1e300, 20200913.0] if name == "double" else [0, 10**15]
    values = [None if second is None else second + 0.25 for second in seconds]
    for row in special:
        values[row] = rng.choice(odd)
    truth = [None if value is None else _number(value) for value in values]
    if name == "double":
        return Column(pa.array(values, pa.float64()), truth)
    decimals = [None if value is None else Decimal(value) for value in values]
    return Column(pa.array(decimals, pa.decimal128(24, 2)), truth)


def _text_times(rng: Random, name: str, seconds: Sequence[int | None], special: Sequence[int]) -> Column:
    values = [None if second is None else _iso(second) if name == "iso" else str(second) for second in seconds]
    truth = [None if second is None else Fraction(second) for second in seconds]
    for row in special:
        values[row] = rng.choice(sorted(_WORDS))
        truth[row] = _WORDS[values[row]]
    return Column(_text(values, _TEXT["dictionary" if name == "dictionary" else "string"]), truth)


def _dates(rng: Random, name: str, seconds: Sequence[int | None], special: Sequence[int]) -> Column:
    step, factor = 86_400 if name != "i32" else 1, 86_400_000 if name == "date64" else 1
    days = [None if second is None else second // step for second in seconds]
    for row in special:
        days[row] = rng.choice([0, _YEAR_1 // 86_400, _FUTURE // 86_400])
    array = pa.array([None if day is None else day * factor for day in days], pa.int64())
    array = array if name == "date64" else array.cast(pa.int32())
    return Column(array.cast(_DAYS[name]), [None if day is None else Fraction(day * step) for day in days])


def _stamps(rng: Random, name: str, seconds: Sequence[int | None], special: Sequence[int]) -> Column:
    unit, _, zone = name.partition(" ")
    values = list(seconds)
    for row in special:
        values[row] = rng.choice([0, _FUTURE] if unit == "ns" else [0, _YEAR_1 - 1, _YEAR_1, _FUTURE, _LAST, _LAST + 1])
    truth = [None if second is None else Fraction(second) if second <= _LAST else BROKEN for second in values]
    whole = pa.array([None if second is None else second * _UNITS[unit] for second in values], pa.int64())
    return Column(whole.cast(pa.timestamp(unit, {"naive": None, "utc": "UTC"}.get(zone, zone))), truth)


def positions(rng: Random, values: Sequence[int | None], odd: bool, simple: bool) -> Column:
    """Places in a history."""
    if odd:
        kind, value = rng.choice(
            [
                (pa.float64(), 0.5),
                (pa.float64(), math.inf),
                (pa.string(), "1"),
                (pa.bool_(), True),
                (pa.list_(pa.int64()), [1]),
            ]
        )
        array = pa.array([None if place is None else value for place in values], kind)
        typed = not pa.types.is_floating(kind)
        wrong = typed or array.null_count < len(array)
        return Column(array, list(values), "places that are no whole numbers" if wrong else "")
    forms = {name: kind for name, kind in _WHOLE.items() if _fits(kind, values)} | {"double": pa.float64()}
    name = rng.choice([name for name in forms if not simple or name in DELTA])
    if name == "double":
        floats = [math.nan if place is None else float(place) for place in values]
        return Column(pa.array(floats, pa.float64(), from_pandas=False), list(values))
    return Column(pa.array(values, forms[name]), list(values))


_FLOATS = {"f32": pa.float32(), "f64": pa.float64(), "f16": pa.float16()}


def numbers(rng: Random, values: Sequence[float | None], odd: bool, simple: bool) -> Column:
    """Ratings or labels. Truth is a number of float32, or None. A column may be boolean where all values are 0 or 1."""
    if odd:
        kind, value = rng.choice([(pa.string(), "5"), (pa.list_(pa.int64()), [5]), (pa.date32(), 5)])
        return Column(
            pa.array([None if number is None else value for number in values], kind),
            list(values),
            "numbers of another type",
        )
    plain = [value for value in values if value is not None]
    forms = {name: kind for name, kind in _FLOATS.items() if not simple or name in DELTA}
    if all(math.isfinite(value) and value == int(value) and abs(value) < 100 for value in plain):
        forms |= {"int64": pa.int64(), "int32": pa.int32()}
        forms |= {} if simple else {"int8": pa.int8(), "decimal": pa.decimal128(5, 0)}
    if plain and {*plain} <= {0, 1}:
        forms["bool"] = pa.bool_()
    kind = forms[rng.choice(sorted(forms))]
    make = float if pa.types.is_floating(kind) else bool if pa.types.is_boolean(kind) else int
    made = [None if value is None else make(value) for value in values]
    with np.errstate(over="ignore"):
        made = [None if value is None else np.float16(value) for value in made] if kind == pa.float16() else made
        truth = [None if value is None or math.isnan(value) else float(np.float32(value)) for value in values]
    return Column(pa.array(made, kind, from_pandas=False), truth)


_NO_VECTOR: tuple[tuple[pa.DataType, Any], ...] = (
    (pa.string(), "1 2"),
    (pa.binary(), b"12"),
    (pa.float32(), 1.0),
    (pa.list_(pa.string()), ["1"]),
    (pa.list_(pa.list_(pa.float32())), [[1.0]]),
    (pa.struct([("x", pa.float32())]), {"x": 1.0}),
)


def vectors(rng: Random, values: Sequence[list[Any] | None], odd: bool, simple: bool) -> Column:
    """Vectors of a modality. Truth is a list of float32, or None."""
    if odd:
        kind, value = rng.choice(_NO_VECTOR)
        return Column(
            pa.array([None if vector is None else value for vector in values], kind),
            list(values),
            "vectors of another type",
        )
    widths = {len(vector) for vector in values if vector is not None}
    flat = [x for vector in values if vector is not None for x in vector]
    whole = all(x is not None and abs(x) < 2**31 and x == int(x) for x in flat)
    forms = {"f32": pa.list_(pa.float32()), "f64": pa.list_(pa.float64())}
    if not simple:
        forms |= {"large": pa.large_list(pa.float32()), "large64": pa.large_list(pa.float64())}
        forms |= {"ints": pa.list_(pa.int64())} if whole and flat else {}
        forms |= {"decimal": pa.list_(pa.decimal128(12, 0))} if whole and flat else {}
        forms |= {"fixed": pa.list_(pa.float32(), widths.pop())} if len(widths) == 1 and 0 not in widths else {}
        forms |= {"null": pa.null()} if all(vector is None for vector in values) else {}
        forms |= {"half": pa.list_(pa.float16())} if None not in flat else {}
    name = rng.choice(sorted(forms))
    if name == "half":
        with np.errstate(over="ignore"):
            halves = [None if vector is None else np.array(vector, np.float16) for vector in values]
        return Column(
            pa.array(halves, forms[name]),
            [None if vector is None else vector.astype(float).tolist() for vector in halves],
        )
    made = list(values)
    if name in {"ints", "decimal"}:
        made = [None if vector is None else [int(x) for x in vector] for vector in values]
    with np.errstate(over="ignore"):
        truth = [None if v is None else [None if x is None else float(np.float32(x)) for x in v] for v in made]
    if name in {"f32", "large", "fixed"}:
        made = truth
    return Column(pa.array(made, forms[name], from_pandas=False), truth)
