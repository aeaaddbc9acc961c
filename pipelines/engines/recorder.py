"""Record in MLflow as far as it answers: what it does not take in time goes to the spool, and no fault is raised."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar
from urllib.parse import urlparse

from mlflow.exceptions import MlflowException

from adasid.config.secrets import masked_text
from adasid.errors import AdasidError, InputError, first_line
from adasid.files import Location
from pipelines import log
from pipelines.engines.records import Server, upload
from pipelines.engines.spool import Kept, Record, Spool

_REFUSED = {
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "NOT_FOUND",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
}
"""MLflow would refuse such a record every time."""

UPLOAD = 12
"""An upload may take this many times as long as another call."""

_SHARE = 0.1
"""The calls of a stage may take this share of its time, once they have taken as long as an upload may."""

_REST = 10
"""After a call that failed, the server is left alone for this many times as long as the call took."""

_TRIES = 10
"""Records that failed so often although the server answered are given up."""

_resting: dict[str, float] = {}
"""Tracking URI -> until when the stages of this process do not call it."""

T = TypeVar("T")


class Recorder:
    """Records of one stage are sent to MLflow or kept. ``seconds``: what a call may take; ``stage``: named in
    lines."""

    def __init__(self, server: Server, spool: Spool, seconds: float, stage: str) -> None:
        self.server, self.spool, self.stage = server, spool, stage
        self.seconds = seconds if urlparse(server.uri).scheme not in {"", "file", "sqlite"} else None
        self.away = False
        self._named = set[str]()
        self._lock, self._spent, self._started = threading.RLock(), 0.0, time.monotonic()

    def open(self) -> None:
        """Call the server for the first time, and send the spool. Raises InputError where the experiment was
        deleted."""
        if time.monotonic() < _resting.get(self.server.uri, 0.0):
            self.away = True
            return
        try:
            self._call(self.server.experiment_id)
        except InputError:
            raise
        except Exception as error:
            self._leave(error)
            return
        _resting.pop(self.server.uri, None)
        files, sent = self.spool.files(), 0
        for path in files:
            if not self._send_file(path):
                break
            sent += 1
        if files:
            left = "" if sent == len(files) else f"; {len(files) - sent} are left for the next stage"
            log.line(f"MLflow: {sent} files of {self.spool.folder} were sent{left}", stage=self.stage)
        self.away = self.away or sent < len(files)

    def warn(self, text: str) -> None:
        """Print a warning."""
        log.line(text, "WARN", self.stage)

    def put(self, record: Record) -> None:
        """Send a record, or keep it where the server does not answer; a record that MLflow refuses is named in one
        line."""
        with self._lock:
            try:
                if not self.away:
                    self._call(partial(self.server.send, record), upload(record))
                    return
            except Exception as error:
                if _refused(error):
                    self._name(record, error)
                    return
                self._leave(error)
            self._keep(record)

    def ask(self, question: Callable[[], T]) -> T | None:
        """Return the server's answer; None where there is none."""
        with self._lock:
            if self.away:
                return None
            try:
                return self._call(question)
            except Exception as error:
                if not _refused(error):
                    self._leave(error)
                return None

    def _call(self, call: Callable[[], T], long: bool = False) -> T:
        """Call the server, for a limited time unless it is a local store."""
        if self.seconds is None:
            return call()
        limit, started = self.seconds * (UPLOAD if long else 1), time.monotonic()
        answer = within(limit, call)
        self._spent += time.monotonic() - started
        elapsed = time.monotonic() - self._started
        if self._spent > max(UPLOAD * self.seconds, _SHARE * elapsed):
            self._leave(TimeoutError(f"its answers took {self._spent:.0f} s of {elapsed:.0f} s"))
        return answer

    def _leave(self, error: Exception) -> None:
        """Call the server no more in this stage."""
        known = self.away or self.server.uri in _resting
        self.away = True
        pause = _REST * self.seconds if isinstance(error, TimeoutError) and self.seconds else 0.0
        _resting[self.server.uri] = time.monotonic() + pause
        if not known:
            self.warn(
                f"MLflow at {self.server.uri} fails ({reason(error)}): records go to {self.spool.folder}, "
                "and the next stage that reaches it sends them"
            )

    def _name(self, record: Record, error: Exception) -> None:
        """Name a record that MLflow refuses; the first one of each kind is enough."""
        if record["do"] not in self._named:
            self._named.add(record["do"])
            self.warn(_not_taken(record, error))

    def _keep(self, record: Record) -> None:
        try:
            if not self.spool.add(record):
                self.warn(f"{self.spool.folder} is full: {record['do']} is lost; start MLflow, or correct tracking.uri")
        except (OSError, AdasidError) as error:
            self.warn(f"{self.spool.folder} cannot be written ({reason(error)}): {record['do']} is lost")

    def _send_file(self, path: Location) -> bool:
        """Send a file of the spool and remove it; return whether its records were sent or given up."""
        try:
            kept = self.spool.read(path)
        except FileNotFoundError:
            return True
        except ValueError as error:
            self.warn(f"{path}: not readable ({reason(error)}); remove it")
            return True
        for number, record in enumerate(kept.records):
            try:
                self._call(partial(self.server.send, record, kept.experiment, again=True), upload(record))
            except Exception as error:
                if _refused(error):
                    self._name(record, error)
                elif not self._give_up(kept, number, error):
                    return False
            if self.away:
                return False
        kept.path.unlink(missing_ok=True)
        return True

    def _give_up(self, kept: Kept, number: int, error: Exception) -> bool:
        """Return whether the record at ``number`` is given up; else keep it and those after it, as the server is away
        or takes them another time."""
        try:
            self._call(lambda: self.server.client.get_experiment_by_name(self.server.experiment))
        except Exception:
            self._leave(error)
            return False
        if kept.tries + 1 >= _TRIES:
            self.warn(_not_taken(kept.records[number], error))
            return True
        self.spool.replace(kept._replace(records=kept.records[number:], tries=kept.tries + 1))
        self.warn(f"{_not_taken(kept.records[number], error)}; a later stage sends it again")
        return False


def within(seconds: float, call: Callable[[], T]) -> T:
    """Return what ``call`` returns. Raises TimeoutError after ``seconds``, whatever it waits for: a name, a connection,
    an answer, or the store of artifacts."""
    answers: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            answers.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return answers[0]


def _refused(error: Exception) -> bool:
    """Return whether MLflow, or the code that calls it, would fail on the same record every time."""
    if isinstance(error, MlflowException):
        return error.error_code in _REFUSED
    return isinstance(error, (AttributeError, InputError, LookupError, TypeError, ValueError))


def _not_taken(record: Record, error: Exception) -> str:
    return f"MLflow has not taken a record of this stage ({record['do']}: {reason(error)})"


def reason(error: Exception) -> str:
    """Return the cause of an error in a few words: of a chain of connection errors, the last part."""
    line = masked_text(first_line(error))
    return line.rpartition("Caused by ")[2].rstrip(")")[:300] if "Caused by " in line else line[:300]
