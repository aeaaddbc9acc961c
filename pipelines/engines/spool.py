"""Keep what MLflow has not taken, as small files of records in the run's folder, until a stage sends them."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from adasid.files import Location, write_json, write_text

Record = dict[str, Any]
"""What is sent to MLflow in one call (:mod:`pipelines.engines.records`)."""

_ROWS = 100
"""Records of one file; it is written whole for each of them."""

_FILES = 1000
"""A spool of so many files is full: what comes then is lost."""

_FULL = "full.json"


class Kept(NamedTuple):
    """A file of the spool: its ``path``, the experiment of its ``records``, and how often they could not be sent
    although the server answered."""

    path: Location
    experiment: str
    records: list[Record]
    tries: int


class Spool:
    """The spool of a run. ``experiment``: of the records that are added; ``rolling``: the oldest file makes room for a
    new one, as there is no server to which it could be sent."""

    def __init__(self, folder: Location, experiment: str, rolling: bool = False) -> None:
        self.folder, self.experiment, self.rolling = folder, experiment, rolling
        self._name, self._number = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}", 0
        self._records: list[Record] = []

    def files(self) -> list[Location]:
        """Return the files with records, oldest first."""
        found: list[Location] = list(self.folder.glob("*.jsonl"))
        return sorted(found, key=lambda path: path.name)

    def versions(self, since: float) -> Iterator[tuple[str, int]]:
        """Yield the tables and versions that stages read or wrote after ``since``, in unix seconds, as far as the
        records are here. Raises ValueError for a file that cannot be read."""
        for path in self.files():
            try:
                rows = self.read(path).records
            except FileNotFoundError:  # another stage has sent it
                continue
            for record in (record for record in rows if record.get("time", 0) >= 1000 * since):
                for name, value in (record.get("tags") or {}).items():
                    if name.startswith(("in.", "out.")):
                        yield name.partition(".")[2], int(value)

    def add(self, record: Record) -> bool:
        """Keep a record; return False where the spool is full."""
        files = self.files() if not self._records else []
        if self.rolling and len(files) >= _FILES:
            files[0].unlink(missing_ok=True)
        elif len(files) >= _FILES:
            write_json(self.folder / _FULL, {"time": time.time()})
            return False
        self._records.append(record)
        path = self.folder / f"{self._name}-{self._number:04d}.jsonl"
        self.replace(Kept(path, self.experiment, self._records, 0))
        if len(self._records) == _ROWS:
            self._records, self._number = [], self._number + 1
        return True

    def replace(self, kept: Kept) -> None:
        """Write a file with the records that are left."""
        rows: list[Mapping[str, Any]] = [{"experiment": kept.experiment, "tries": kept.tries}, *kept.records]
        write_text(kept.path, "".join(json.dumps(row, default=str) + "\n" for row in rows))

    def read(self, path: Location) -> Kept:
        """Return the records of a file. Raises FileNotFoundError where another stage has sent them, ValueError where
        they cannot be read."""
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        try:
            return Kept(path, lines[0]["experiment"], lines[1:], int(lines[0]["tries"]))
        except (LookupError, TypeError) as error:
            raise ValueError(f"{path}: not a file of the spool") from error

    def lost(self, since: float) -> bool:
        """Return whether records were lost after ``since``, in unix seconds, because the spool was full."""
        path = self.folder / _FULL
        return path.exists() and float(json.loads(path.read_text(encoding="utf-8"))["time"]) >= since
