"""Test the lease on a real Delta table: one holder, waiting, death, renewal, loss."""

import threading
import time

import pyarrow as pa
import pytest
from deltalake import write_deltalake

from adasid import config
from adasid.errors import BusyError, InputError
from pipelines.engines.tracking import stage
from pipelines.publish.lease import Lease, leased


class Clock:
    """A clock that is set by hand."""

    def __init__(self):
        self.time = 1_000.0

    def __call__(self):
        return self.time


def test_a_second_one_leaves_with_a_message_and_a_dead_holders_lease_ends(lake):
    clock = Clock()
    first, second = Lease(lake, 30.0, clock), Lease(lake, 30.0, clock)
    first.take(0)
    with pytest.raises(
        BusyError,
        match=rf"the lease of .* is held by {first.holder}, for 30 s more unless it renews: .*retokenize.lease.wait",
    ):
        second.take(0)
    first.check()
    clock.time += 29
    first.renew()
    clock.time += 29
    with pytest.raises(BusyError):
        second.take(0)
    clock.time += 2
    second.take(0)
    with pytest.raises(BusyError, match=rf"was lost \(holder: {second.holder}\)"):
        first.check()
    first.renew()
    second.check()
    first.give_back()  # not its own any more
    second.check()
    second.give_back()
    first_again = Lease(lake, 30.0, clock)
    first_again.take(0)


def test_of_many_at_once_one_gets_it(lake):
    found, barrier = [], threading.Barrier(6)

    def run():
        lease = Lease(lake, 60.0)
        barrier.wait()
        try:
            lease.take(0)
            found.append(lease)
        except BusyError:
            pass

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 1
    found[0].check()


def test_it_is_renewed_while_the_run_works_and_released(make_config):
    with stage(make_config(), "lease") as context:
        with leased(context, config.Lease(seconds=0.6, wait=0.0)) as lease:
            time.sleep(1.5)
            lease.check()
            with pytest.raises(BusyError):
                Lease(context.lake, 0.6).take(0)
        with leased(context, config.Lease(seconds=60.0, wait=0.0)) as lease:
            lease.check()


def test_one_that_waits_gets_it_when_it_is_free(lake):
    first, got = Lease(lake, 60.0), []
    first.take(0)
    notes = []
    waiting = threading.Thread(target=lambda: (Lease(lake, 60.0).take(20, notes.append), got.append(True)))
    waiting.start()
    time.sleep(0.5)
    assert not got
    first.give_back()
    waiting.join()
    assert got and len(notes) == 1 and f"waiting at most 20 s for the lease of {first.holder}" in notes[0]


def test_another_length_of_lease_is_respected_and_an_expired_one_is_lost(lake):
    clock = Clock()
    long, short = Lease(lake, 600.0, clock), Lease(lake, 10.0, clock)
    long.take(0)
    with pytest.raises(BusyError):
        short.take(0)
    clock.time += 601
    with pytest.raises(BusyError, match="was lost"):
        long.check()


def test_a_renewal_that_cannot_be_written_loses_the_lease(lake, monkeypatch):
    lease = Lease(lake, 30.0)
    lease.take(0)

    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(lease, "_commit", full)
    lease.renew()
    with pytest.raises(BusyError, match="was lost"):
        lease.check()


def test_a_lease_of_another_layout_is_named(lake):
    write_deltalake(lake.path("leases"), pa.table({"owner": ["x"]}))
    with pytest.raises(InputError, match=r"leases has columns owner, expected holder, expires, seconds: .* remove it"):
        Lease(lake, 30.0).take(0.0)
