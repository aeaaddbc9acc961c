"""Allow one run at a time: a lease in the lake, taken and renewed by commits that succeed only on the version that was
read.

No clock is compared with that of another machine. The holder renews the lease from a separate thread, and counts it as
expired ``seconds`` after its last renewal by its own clock. Another process watches the table, and takes the lease
once the holder has released it, or once the table has not changed for ``seconds`` by the watcher's own clock.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, write_deltalake
from deltalake.exceptions import CommitFailedError

from adasid import config, tables
from adasid.errors import BusyError, InputError, first_line
from adasid.storage import delta_options
from pipelines.engines.lake import Lake
from pipelines.engines.tracking import StageContext

_TABLE = "leases"
_POINTERS = {"live", "generations"}
_POLL = 1.0
LOG = {"delta.enableExpiredLogCleanup": "true", "delta.logRetentionDuration": "interval 1 days"}
"""Every renewal is a commit: without these properties the table's log would grow without end."""


def elapsed() -> float:
    """Return seconds by a clock that nobody sets, and that also runs while the machine is suspended (where it can)."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class Lease:
    """A lease is the right to publish into one lake. ``clock``: this machine's, in seconds (:func:`elapsed`)."""

    def __init__(self, lake: Lake, seconds: float, clock: Callable[[], float] = elapsed) -> None:
        self.lake, self.seconds, self.clock = lake, seconds, clock
        self.holder = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._lost: str | None = None
        self._renewed: float | None = None
        self._ended, self._one = threading.Event(), threading.Lock()

    def take(self, wait: float, note: Callable[[str], None] = lambda text: None) -> None:
        """Become the holder, waiting at most ``wait`` seconds for another one, after a ``note``. Raises BusyError where
        another run still has the lease, InputError where the table is of another version of adasid."""
        with suppress(CommitFailedError):  # another run has just created it
            options = delta_options(self.lake.root)
            DeltaTable.create(
                self.lake.path(_TABLE), schema=tables.LEASES, mode="ignore", configuration=LOG, storage_options=options
            )
        deadline, noted, seen, since = self.clock() + wait, "", -1, 0.0
        while True:
            now, table = self.clock(), self._table()
            other, seconds = _read(table)
            if table.version() != seen:
                seen, since = table.version(), self.clock()
            if (other in (None, self.holder) or now - since >= seconds) and self._commit(table, self.holder):
                self._renewed = now
                return
            if self.clock() >= deadline:
                raise BusyError(
                    f"the lease of {self.lake.root} belongs to {other or 'another run that was faster'}: wait for it "
                    f"to end; if that run is dead, its lease ends {seconds:.0f} s after this job has first seen it: "
                    "let retokenize.lease.wait be longer"
                )
            if other and other != noted:
                noted = other
                note(
                    f"waiting at most {wait:.0f} s for the lease of {other}, which ends {seconds:.0f} s after its last "
                    "renewal"
                )
            time.sleep(min(_POLL, seconds / 4, max(0.0, deadline - self.clock())))

    def _table(self) -> DeltaTable:
        table = self.lake.delta(_TABLE)
        names = [field.name for field in table.schema().fields]
        if names != tables.LEASES.names:
            raise InputError(
                f"{self.lake.path(_TABLE)} has columns {', '.join(names)}, expected {', '.join(tables.LEASES.names)}: "
                "it is of another version of adasid; remove it while no run is at work"
            )
        return table

    def _commit(self, table: DeltaTable, holder: str | None) -> bool:
        """Return whether the row could be written as the version after ``table``'s."""
        expires = time.time() + self.seconds if holder else 0.0
        row = pa.table({"holder": [holder], "expires": [expires], "seconds": [self.seconds]}, schema=tables.LEASES)
        try:
            write_deltalake(table, row, mode="overwrite", commit_properties=CommitProperties(max_commit_retries=0))
        except CommitFailedError:
            return False
        return True

    def check(self) -> None:
        """Renew the lease if storage answers. Raises BusyError unless this process is still the holder."""
        self.renew()
        if self._lost:
            raise BusyError(
                f"the lease of {self.lake.root} was lost ({self._lost}): this run could not renew it for longer than "
                f"retokenize.lease.seconds ({self.seconds:g}); run it again"
            )

    def renew(self) -> bool:
        """Extend the lease by ``seconds``; return whether that was possible. It is lost where another process has it,
        or where ``seconds`` have passed since the last renewal."""
        with self._one:
            now = self.clock()
            if self._renewed is None or now - self._renewed >= self.seconds:
                self._lost = self._lost or "it expired"
            if self._lost:
                return False
            try:
                table = self._table()
                holder, _ = _read(table)
                if holder != self.holder:
                    self._lost = f"holder: {holder}"
                    return False
                renewed = self._commit(table, self.holder)
            except Exception:  # storage that does not answer now may answer at the next attempt
                return False
            if renewed:
                self._renewed = now
            return renewed

    def give_back(self) -> None:
        """Release the lease."""
        with self._one:
            table = self.lake.delta(_TABLE)
            if _read(table)[0] == self.holder:
                self._commit(table, None)

    def renew_until_ended(self) -> None:
        """Renew the lease at intervals, shorter ones after a failure, until :meth:`end` or until it is lost."""
        pause = self.seconds / 3
        while not self._ended.wait(pause) and not self._lost:
            pause = self.seconds / (3 if self.renew() else 12)

    def end(self) -> None:
        """Tell :meth:`renew_until_ended` to return."""
        self._ended.set()


def _read(table: DeltaTable) -> tuple[str | None, float]:
    """Return the holder, None for none, and the seconds of its lease."""
    rows = table.to_pyarrow_table().to_pylist()
    return (rows[0]["holder"], float(rows[0]["seconds"])) if rows else (None, 0.0)


def check_pins(cfg: config.Config) -> None:
    """Raise InputError where the tables of generations are pinned: an older pointer would be followed, and what the
    newer one needs be replaced or removed."""
    for name in sorted(_POINTERS & set(cfg.pins)):
        raise InputError(
            f"pins.{name} is {cfg.pins[name]}, but jobs that publish or maintain follow its newest version: leave this "
            "pin to the configs of other jobs"
        )


@contextmanager
def leased(context: StageContext, settings: config.Lease) -> Iterator[Lease]:
    """Take the lease, renew it meanwhile, release it."""
    check_pins(context.cfg)
    lease = Lease(context.lake, settings.seconds)
    lease.take(settings.wait, context.note)
    renewer = threading.Thread(target=lease.renew_until_ended, daemon=True)
    renewer.start()
    try:
        yield lease
    finally:
        lease.end()
        renewer.join(settings.seconds)
        try:
            lease.give_back()
        except Exception as error:  # it must not replace the error that ended the run
            context.note(
                f"the lease could not be released ({first_line(error)}): it ends by itself in {settings.seconds:g} s"
            )
