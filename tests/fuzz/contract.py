"""Run an example as the jobs do, and assert what holds for any input.

Either a job ends with its exit code and one line, or every row is accounted for.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from math import isfinite
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from adasid import tables
from adasid.config import Config
from pipelines import cli, content, features, ingest
from pipelines.engines.lake import Lake
from pipelines.engines.tracking import StageContext
from tests.fuzz.forms import BROKEN
from tests.fuzz.strategies import Example

ID_FAULTS = ("null", "not_utf8", "empty", "control_character")
REASONS = {
    *(f"{fault}_{column}" for fault in ID_FAULTS for column in ("item_id", "user_id")),
    *(
        "duplicate_item",
        "wrong_dimension",
        "non_finite",
        "unknown_item",
        "no_order",
        "invalid_label",
        "invalid_rating",
        "unparsable_json",
    ),
    *("unparsable_timestamp", "implausible_timestamp", "future_timestamp"),
}
TRACES = ("Traceback", "at org.apache", "Caused by", "Py4J", "java.lang", "  File ", "\tat ")
FIXES = re.compile(
    r"\b(add|bring|call|cast|check|choose|correct|did you mean|embed|give|import|leave|look|lower|mend|must|raise)\b"
    r"|\b(remove|rename|run|set|should|store|take|trim|write)\b"
)
THINGS = ("source.", "table ", "features.", "config.yaml", "item_id", "user_id")
NOTE = re.compile(r"20\S+Z (INFO |WARN ) r/\w+: ")
ERROR = re.compile(r"20\S+Z ERROR (r/\w+: |r: )?")
OUTPUTS = ("item_stats", "user_stats", "ranking_samples", "sequences", "catalog_stats", "rejected_rows")


@dataclass
class Outcome:
    """What a run of both stages came to."""

    code: int
    line: str = ""
    reasons: Counter[str] = field(default_factory=Counter)
    log: str = ""


class Screen:
    """What Spark's own log writes, with the layout of the product."""

    def __init__(self, spark: Any) -> None:
        core = spark._jvm.org.apache.logging.log4j.core
        self._log = spark._jvm.java.io.StringWriter()
        root = spark._jvm.org.apache.logging.log4j.LogManager.getContext(False).getConfiguration().getRootLogger()
        layout = next(iter(root.getAppenders().values())).getLayout()
        self._writer = core.appender.WriterAppender.createAppender(layout, None, self._log, "fuzz", False, True)
        self._writer.start()
        self._root = root
        root.addAppender(self._writer, None, None)

    def take(self) -> str:
        """What came since the last call."""
        text = str(self._log.toString())
        self._log.getBuffer().setLength(0)
        return text

    def close(self) -> None:
        self._root.removeAppender("fuzz")


def run(example: Example, folder: Path, uri: str, screen: Screen) -> Outcome:
    """Ingest and build_features, the second twice; asserts the contract on the way. ``folder`` then holds the case."""
    example.write(folder)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(_absolute(example, folder, uri), sort_keys=False), encoding="utf-8")
    lake = Lake(str(folder / "runs" / "r" / "lake"), {})
    if example.before:
        _prime(lake, folder, example)
    old = _raw(lake)
    screen.take()
    code, line = _job(path, "ingest", ingest.run)
    log = screen.take()
    if code:
        assert _raw(lake) == old, "a failed ingest changed a table"
        return _refused(example, Outcome(code, line, log=log), folder)
    assert not example.refused, f"ingest took {example.refused}"
    _rows_arrived(example, lake)
    code, line = _job(path, "content", content.run)
    if code:
        return _refused(example, Outcome(code, line, log=log + screen.take()), folder)
    part = "auto" if example.config["behavior"] else "events"
    build = lambda cfg, context: features.run(cfg, context, part)  # noqa: E731
    code, line = _job(path, "features", build)
    outcome = Outcome(code, line, log=log + screen.take())
    expected = Expected(example)
    if code:
        assert code == 2 or expected.may_fail, f"sound input was refused: {line}"
        return _refused(example, outcome, folder)
    assert not expected.must_fail, f"features took what it should refuse: {expected.must_fail}"
    _accounted(example, expected, lake, outcome)
    before = {name: lake.version(name) for name in (*OUTPUTS, "items", "interactions")}
    code, text = _job(path, "features", build, last=True)
    assert code == 0 and ": up to date in" in text, f"built again: {text}"
    assert before == {name: lake.version(name) for name in before}, "an up-to-date table was written"
    _quiet(outcome.log)
    return outcome


def _raw(lake: Lake) -> dict[str, Any]:
    return {name: lake.read(name).to_pylist() if lake.exists(name) else None for name in ("items", "interactions")}


def _absolute(example: Example, folder: Path, uri: str) -> dict[str, Any]:
    """The config with the folder's paths and the engines' settings."""
    config: dict[str, Any] = json.loads(json.dumps(example.config))
    source = config.get("source", {})
    section = source.get(next((kind for kind in ("tables", "arrays", "amazon") if kind in source), ""), {})
    for key in {"folder"} & {*section} or {"items", "interactions", "reviews", "metadata"} & {*section}:
        section[key] = str(folder / section[key])
    if isinstance(config.get("features", {}), dict):
        config["features"] = {"user_buckets": 2, **config.get("features", {})}  # each bucket costs some tasks
    own = {
        "runs_dir": str(folder / "runs"),
        "tracking": {"uri": uri},
        "spark": {"master": "local[1]", "shuffle_partitions": 1},
        "ray": {"workers": 0},
    }
    return {"name": "r", **own, **config}


def _prime(lake: Lake, folder: Path, example: Example) -> None:
    modalities = [*example.config["features"]["content"]] if isinstance(example.config["features"], dict) else []
    for name, schema in (("items", tables.items(modalities)), ("interactions", tables.INTERACTIONS)):
        Path(lake.path(name)).mkdir(parents=True)
        lake.write(name, schema, pa.Table.from_pylist([{"item_id": "before"}], schema).to_batches(), "before")


def _job(
    path: Path, name: str, function: Callable[[Config, StageContext], None], last: bool = False
) -> tuple[int, str]:
    """Exit code, and the line that tells the user why (``last``: the last line, whatever it is)."""
    screen = io.StringIO()
    with contextlib.redirect_stderr(screen):
        code = cli.run(argparse.Namespace(config=str(path), overrides=[]), cli.stage(name, function))
    text = screen.getvalue()
    _quiet(text)
    lines = text.splitlines()
    errors = [line for line in text.split("\n") if ERROR.match(line)]
    others = [line for line in text.split("\n") if line and not NOTE.match(line) and line not in errors]
    assert not others, f"other lines on the screen: {others}"
    assert len(errors) == (1 if code else 0), f"exit {code} with {len(errors)} error lines: {text}"
    return code, lines[-1] if last else "".join(errors)


def _quiet(text: str) -> None:
    found = [mark for mark in TRACES if mark in text and not (mark == "java.lang" and "not readable" in text)]
    assert not found, f"an engine's words on the screen ({found}):\n{text[:3000]}"


def _refused(example: Example, outcome: Outcome, folder: Path) -> Outcome:
    line = outcome.line
    assert outcome.code in {2, 3}, f"exit code {outcome.code}: {line}"
    assert (outcome.code == 2) == bool(example.wrong), f"exit code {outcome.code}, wrong is {example.wrong!r}: {line}"
    assert str(folder) in line or any(thing in line for thing in THINGS), f"names no table, column, key or file: {line}"
    assert re.search("[;:]", ERROR.sub("", line)) and FIXES.search(line), f"says no fix: {line}"
    _quiet(outcome.log)
    return outcome


def _rows_arrived(example: Example, lake: Lake) -> None:
    for name, truth in (("items", example.items), ("interactions", example.events)):
        found = lake.read(name)
        assert found.num_rows == len(truth), f"{name}: {len(truth)} rows in the source, {found.num_rows} in the lake"


def id_fault(value: Any, column: str) -> str | None:
    """Why an id is refused."""
    if value is None:
        return f"null_{column}"
    if isinstance(value, bytes):
        return f"not_utf8_{column}"
    kinds = [unicodedata.category(c) for c in value]
    if all(kind[0] == "Z" or c in " \t\n\x0b\f\r" for kind, c in zip(kinds, value)):
        return f"empty_{column}"
    return f"control_character_{column}" if any(kind in {"Cc", "Zl", "Zp"} for kind in kinds) else None


class Expected:
    """What plain Python makes of an example: items and events that are accepted, and how many rows are refused why."""

    def __init__(self, example: Example) -> None:
        self.example, self.features = example, example.config["features"]
        self.modalities = [*self.features["content"], *(["behavior"] if example.config["behavior"] else [])]
        faults = [id_fault(row["item_id"], "item_id") for row in example.items]
        self.item_faults = Counter(fault for fault in faults if fault)
        named = [(row["item_id"], self._vector_fault(row)) for row, fault in zip(example.items, faults) if not fault]
        self.items = {name for name, fault in named if not fault}
        verdicts = [self._event(row) for row in example.events]
        self.events = Counter(verdict for verdict in verdicts if verdict)
        self.good = [row for row, verdict in zip(example.events, verdicts) if not verdict]
        copies = self._copies(faults)
        unparsed = example.unparsable
        self.must_fail, self.may_fail = "", self._may_fail()
        limit = self.features.get("max_rejected", 0.05)
        bounds = {
            "items": (
                len(example.items),
                len(example.items) - len(self.items) - copies,
                sum(self.item_faults.values()) + self._faulty(named),
                unparsed.get("items", 0),
            ),
            "interactions": (
                len(example.events),
                sum(self.events.values()),
                sum(self.events.values()),
                unparsed.get("interactions", 0),
            ),
        }
        for table, (rows, most, least, lines) in bounds.items():
            accepted = self.items if table == "items" else self.good
            if not accepted or (least + lines) / (rows + lines) > limit:
                self.must_fail = f"{table}: {least} to {most} of {rows} rows and {lines} lines are bad"
            if (most + lines) / max(rows + lines, 1) > limit:
                self.may_fail = True
        for name in self.modalities:
            given = any(_present(row.get(name)) for row in example.items)
            if example.config["source"]["kind"] != "amazon" and not given:
                self.must_fail = self.must_fail or f"no vector in {name}"
        self._positive()
        self.may_fail = self.may_fail or bool(self.must_fail)

    def _vector_fault(self, row: dict[str, Any]) -> bool:
        for name in self.modalities:
            vector = row.get(name)
            if not _present(vector):
                continue
            sizes = Counter(len(other[name]) for other in self.example.items if _present(other.get(name)))
            usual = min(sizes, key=lambda size: (-sizes[size], size))
            if len(vector) != usual or not all(x is not None and isfinite(x) for x in vector):
                return True
        return False

    def _faulty(self, named: list[tuple[Any, bool]]) -> int:
        return sum(fault for _, fault in named)

    def _copies(self, faults: list[str | None]) -> int:
        """Rows that say word for word what another one says, at least: they are dropped, and rejected in no case."""
        rows: dict[Any, list[str]] = {}
        for row, fault in zip(self.example.items, faults):
            if not fault and not self._vector_fault(row):
                content = repr([row.get(name) for name in ("title", *self.modalities)])
                rows.setdefault(row["item_id"], []).append(content)
        known = self.example.config["source"]["kind"] != "amazon"
        return sum(len(same) - 1 for same in rows.values() if known and len({*same}) == 1)

    def _event(self, row: dict[str, Any]) -> str | None:
        fault = id_fault(row["user_id"], "user_id") or id_fault(row["item_id"], "item_id")
        if fault or row["item_id"] not in self.items:
            return fault or "unknown_item"
        label, rating = row["label"], row["rating"]
        time = self._time(row["time"]) if row["time"] is not None else None if row["pos"] is not None else "no_order"
        if time or (label is not None and label not in {0.0, 1.0}):
            return time or "invalid_label"
        return "invalid_rating" if rating is not None and abs(rating) == float("inf") else None

    def _time(self, second: Any) -> str | None:
        now = self.features.get("now")
        moment = datetime.fromisoformat(now) if now else datetime.now(timezone.utc)
        moment = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
        if second == BROKEN:
            return "unparsable_timestamp"
        year = datetime(self.features.get("first_year", 1990), 1, 1, tzinfo=timezone.utc)
        low = (year - datetime(1970, 1, 1, tzinfo=timezone.utc)).total_seconds()
        if second < low:
            return "implausible_timestamp"
        return "future_timestamp" if second > moment.timestamp() else None

    def _may_fail(self) -> bool:
        """Settings may leave no event to train on."""
        low = self.features.get("positive_rating", 3.0)
        said = [(row["label"], row["rating"]) for row in self.example.events]
        rated = any(label == 0 or (rating is not None and rating <= low) for label, rating in said)
        split = self.features.get("split") == "global_time" or self.features.get("ranking_split", "auto") in {
            "global_time",
            rated and "auto",
        }
        return self.features.get("k_core", 0) > 1 or split or self.features.get("histories") == "positive"

    def _positive(self) -> None:
        labels, ratings = ([row[name] for row in self.good if row[name] is not None] for name in ("label", "rating"))
        limit = self.features.get("positive_rating", 3.0)
        said = any(label == 1 for label in labels) or any(rating > limit for rating in ratings)
        if (labels or ratings) and not said:
            self.must_fail = self.must_fail or "no event is positive"


def _present(vector: list[Any] | None) -> bool:
    return bool(vector) and not all(x == 0 for x in vector)  # type: ignore[union-attr]


def _accounted(example: Example, expected: Expected, lake: Lake, outcome: Outcome) -> None:
    stats, row = lake.read("item_stats").to_pylist(), lake.read("catalog_stats").to_pylist()[0]
    mine = {row["input_hash"], lake.input_hash("items")}
    rejected = [bad for bad in lake.read("rejected_rows").to_pylist() if bad["input_hash"] in mine]
    for bad in rejected:
        json.loads(bad["row"])
        assert bad["copies"] > 0 and bad["reason"] in REASONS, f"rejected: {bad}"
        outcome.reasons[bad["reason"]] += bad["copies"]
    of = {name: Counter[str]() for name in ("items", "interactions")}
    for bad in rejected:
        of[bad["table"]][bad["reason"]] += bad["copies"]
    assert dict(row["rejected"]) == outcome.reasons, f"{row['rejected']}, but rejected_rows: {outcome.reasons}"
    lines = {name: counted.pop("unparsable_json", 0) for name, counted in of.items()}
    assert lines == {name: example.unparsable.get(name, 0) for name in of}, f"lines that are no JSON: {lines}"
    total = len(stats) + row["duplicate_items"] + sum(of["items"].values())
    assert total == len(example.items), f"items: {len(example.items)} rows came in, {total} are accounted for"
    dropped = sum(row[name] for name in ("interactions", "duplicates", "capped", "below_k_core"))
    total = dropped + sum(of["interactions"].values())
    assert total == len(example.events), f"interactions: {len(example.events)} rows came in, {total} are accounted for"
    assert of["interactions"] == expected.events, f"rejected events: {of['interactions']}, expected {expected.events}"
    assert expected.item_faults.items() <= of["items"].items(), f"items: {of['items']}, expected {expected.item_faults}"
    assert {item["item_id"] for item in stats} == expected.items, "item_stats has other items than the source"
    assert sorted(item["item_index"] for item in stats) == [*range(len(stats))], "item_index is not dense"
    _samples(lake, stats, row, expected)
    if example.config["behavior"]:
        assert lake.read("item_features").num_rows == len(stats), "item_features has other rows than item_stats"


def _samples(lake: Lake, stats: list[dict[str, Any]], row: dict[str, Any], expected: Expected) -> None:
    names = {item["item_index"]: item["item_id"] for item in stats}
    counts = {item["item_index"]: item["interactions"] for item in stats}
    accepted = {(event["user_id"], event["item_id"]) for event in expected.good}
    samples = lake.read("ranking_samples").to_pylist()
    places: dict[str, list[int]] = {}
    for sample in samples:
        places.setdefault(sample["user_id"], []).append(sample["position"])
        assert (sample["user_id"], names[sample["item_index"]]) in accepted, f"ranking_samples: {sample}"
        assert sample["label"] in {0, 1, None}, f"ranking_samples: {sample}"
    trained = Counter(sample["item_index"] for sample in samples if sample["split"] == "train")
    assert {item: n for item, n in counts.items() if n} == trained, "item_stats counts other events than train"
    assert len(samples) == row["interactions"] and len(places) == row["users"], f"{len(samples)} ranking samples; {row}"
    for user, found in places.items():
        assert sorted(found) == [*range(len(found))], f"ranking_samples: positions of {user!r} are {found}"
    for sequence in lake.read("sequences").to_pylist():
        targets = [] if sequence["target"] is None else [sequence["target"]]
        assert {*sequence["history"], *targets} <= {*names}, f"sequences: {sequence}"
