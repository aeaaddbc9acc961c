"""Allow one run at a time: a lease in the lake, taken and renewed by commits that succeed only on the version that was
read.

A holder renews the lease from a separate thread. A dead holder does not, and its lease expires; a holder that was
suspended notices the lost lease at its next :meth:`Lease.check`, which comes before every commit of a publication.
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
from adasid.errors import BusyError, InputError
from pipelines.engines.lake import Lake
from pipelines.engines.tracking import StageContext

_TABLE = "leases"
_POLL = 1.0


class Lease:
    """A lease is the right to publish into one lake. ``now``: the clock, in unix seconds."""

    def __init__(self, lake: Lake, seconds: float, now: Callable[[], float] = time.time) -> None:
        self.lake, self.seconds, self.now = lake, seconds, now
        self.holder = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._lost, self._ended = threading.Event(), threading.Event()

    def take(self, wait: float, note: Callable[[str], None] = lambda text: None) -> None:
        """Become the holder, waiting at most ``wait`` seconds for another one, after a ``note``. Raises BusyError where
        another run still has the lease, InputError where the table is of another version of adasid."""
        with suppress(CommitFailedError):  # another run has just created it
            DeltaTable.create(self.lake.path(_TABLE), schema=tables.LEASES, mode="ignore")
        deadline, noted = time.monotonic() + wait, ""
        while True:
            table = self._table()
            other = self._holder(table)
            if other is None and self._commit(table, self.holder, self.now() + self.seconds):
                return
            if time.monotonic() >= deadline:
                who = (
                    f"{other[0]}, for {other[1] - self.now():.0f} s more unless it renews"
                    if other
                    else "another run that was faster"
                )
                raise BusyError(
                    f"the lease of {self.lake.root} is held by {who}: wait for it to end, or raise "
                    "retokenize.lease.wait"
                )
            if other and other[0] != noted:
                noted = other[0]
                note(
                    f"waiting at most {wait:.0f} s for the lease of {other[0]}, which ends in "
                    f"{other[1] - self.now():.0f} s unless it is renewed"
                )
            time.sleep(min(_POLL, max(0.0, deadline - time.monotonic())))

    def _table(self) -> DeltaTable:
        table = DeltaTable(self.lake.path(_TABLE))
        names = [field.name for field in table.schema().fields]
        if names != tables.LEASES.names:
            raise InputError(
                f"{self.lake.path(_TABLE)} has columns {', '.join(names)}, expected {', '.join(tables.LEASES.names)}: "
                "it is of another version of adasid; remove it while no run is at work"
            )
        return table

    def _holder(self, table: DeltaTable) -> tuple[str, float] | None:
        """Return the current holder and the expiry, None for none. A lease that expires later than any could have been
        taken is from before the clock jumped back, and void."""
        rows = table.to_pyarrow_table().to_pylist()
        if (
            not rows
            or rows[0]["holder"] in (None, self.holder)
            or not 0 < rows[0]["expires"] - self.now() <= 2 * rows[0]["seconds"]
        ):
            return None
        return rows[0]["holder"], rows[0]["expires"]

    def _commit(self, table: DeltaTable, holder: str | None, expires: float) -> bool:
        """Return whether the row could be written as the version after ``table``'s."""
        row = pa.table({"holder": [holder], "expires": [expires], "seconds": [self.seconds]}, schema=tables.LEASES)
        try:
            write_deltalake(table, row, mode="overwrite", commit_properties=CommitProperties(max_commit_retries=0))
        except CommitFailedError:
            return False
        return True

    def check(self) -> None:
        """Raise BusyError unless this process is still the holder."""
        rows = DeltaTable(self.lake.path(_TABLE)).to_pyarrow_table().to_pylist()
        if self._lost.is_set() or not rows or rows[0]["holder"] != self.holder or rows[0]["expires"] <= self.now():
            last = rows[0]["holder"] if rows else None
            raise BusyError(
                f"the lease of {self.lake.root} was lost (holder: {last}): this run could not renew it for longer than "
                "retokenize.lease.seconds; run it again"
            )

    def renew(self) -> None:
        """Extend the lease by ``seconds``; after the first renewal that fails, for whatever reason, it is lost."""
        try:
            table = DeltaTable(self.lake.path(_TABLE))
            rows = table.to_pyarrow_table().to_pylist()
            renewed = (
                bool(rows)
                and rows[0]["holder"] == self.holder
                and self._commit(table, self.holder, self.now() + self.seconds)
            )
        except Exception:
            renewed = False
        if not renewed:
            self._lost.set()

    def give_back(self) -> None:
        """Release the lease."""
        table = DeltaTable(self.lake.path(_TABLE))
        rows = table.to_pyarrow_table().to_pylist()
        if rows and rows[0]["holder"] == self.holder:
            self._commit(table, None, 0.0)

    def renew_until_ended(self) -> None:
        """Renew the lease at intervals, until :meth:`end` or until it is lost."""
        while not self._ended.wait(self.seconds / 3) and not self._lost.is_set():
            self.renew()

    def end(self) -> None:
        """Tell :meth:`renew_until_ended` to return."""
        self._ended.set()


@contextmanager
def leased(context: StageContext, settings: config.Lease) -> Iterator[Lease]:
    """Take the lease, renew it meanwhile, release it."""
    lease = Lease(context.lake, settings.seconds)
    lease.take(settings.wait, context.note)
    renewer = threading.Thread(target=lease.renew_until_ended, daemon=True)
    renewer.start()
    try:
        yield lease
    finally:
        lease.end()
        renewer.join()
        lease.give_back()
