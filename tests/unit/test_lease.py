"""Test the lease on a real Delta table: one holder, waiting, death, renewal, loss, clocks, a stopped process."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

import pipelines.publish.lease
from adasid import config, tables
from adasid.errors import BusyError, GateError, InputError
from pipelines.engines.tracking import stage
from pipelines.publish import generations
from pipelines.publish.lease import Lease, leased
from tests.unit.test_generations import candidate

ROOT = Path(__file__).parents[2]


class Clock:
    """A clock that is set by hand."""

    def __init__(self, start=1_000.0):
        self.time = start

    def __call__(self):
        return self.time


def watched(monkeypatch, lease, clock, step, wait, meanwhile=lambda: None):
    """Take a lease, where ``step`` seconds pass by the taker's clock between two looks at the table."""

    def sleep(seconds):
        clock.time += step
        meanwhile()

    ours = SimpleNamespace(**{**vars(pipelines.publish.lease.time), "sleep": sleep})  # other threads sleep, too
    monkeypatch.setattr("pipelines.publish.lease.time", ours)
    lease.take(wait)


def test_a_second_one_leaves_with_a_message_and_a_dead_holders_lease_ends(lake, monkeypatch):
    mine, theirs = Clock(), Clock(50.0)
    first, second = Lease(lake, 30.0, mine), Lease(lake, 30.0, theirs)
    first.take(0)
    with pytest.raises(BusyError, match=rf"belongs to {first.holder}: .*30 s after this job .*retokenize.lease.wait"):
        second.take(0)
    first.check()
    with pytest.raises(BusyError):
        watched(monkeypatch, second, theirs, 7, 21)
    watched(monkeypatch, second, theirs, 7, 60)
    with pytest.raises(BusyError, match=rf"was lost \(holder: {second.holder}\)"):
        first.check()
    assert not first.renew()
    second.check()
    first.give_back()  # not its own any more
    second.check()
    second.give_back()
    Lease(lake, 30.0).take(0)


@pytest.mark.parametrize("skew", [-600.0, 600.0])
def test_wall_clocks_that_differ_neither_steal_nor_block(lake, monkeypatch, skew):
    mine, theirs, walls = Clock(), Clock(), Clock(time.time())
    monkeypatch.setattr("pipelines.publish.lease.time", SimpleNamespace(**{**vars(time), "time": walls}))
    first, second = Lease(lake, 30.0, mine), Lease(lake, 30.0, theirs)
    first.take(0)
    walls.time += skew

    def renewed():
        mine.time += 10
        assert first.renew()

    with pytest.raises(BusyError):  # a holder that renews is never robbed
        watched(monkeypatch, second, theirs, 10, 300, renewed)
    first.check()
    watched(monkeypatch, second, theirs, 10, 60)  # and one that does not, is after 30 s
    assert theirs.time - 1_000 < 400
    second.check()


@pytest.mark.parametrize(("takers", "wait", "dead"), [(6, 0, False), (4, 3, True)], ids=["at once", "a dead holder"])
def test_of_many_one_gets_it(lake, takers, wait, dead):
    if dead:
        Lease(lake, 0.5).take(0)
    winners, barrier = [], threading.Barrier(takers)

    def run():
        lease = Lease(lake, 60.0)
        barrier.wait()
        try:
            lease.take(wait)
            winners.append(lease)
        except BusyError:
            pass

    threads = [threading.Thread(target=run) for _ in range(takers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1
    winners[0].check()


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


def test_the_holder_counts_its_own_time_and_another_length_is_respected(lake, monkeypatch):
    mine, theirs = Clock(), Clock()
    long, short = Lease(lake, 600.0, mine), Lease(lake, 10.0, theirs)
    long.take(0)
    with pytest.raises(BusyError):
        watched(monkeypatch, short, theirs, 50, 500)
    mine.time += 599
    long.check()
    mine.time += 601
    with pytest.raises(BusyError, match=r"was lost \(it expired\)"):
        long.check()
    assert not long.renew()


def test_a_renewal_that_fails_is_repeated_and_loses_the_lease_only_when_it_expires(lake, monkeypatch):
    clock = Clock()
    lease = Lease(lake, 30.0, clock)
    lease.take(0)
    place, aside = Path(lake.path("leases")), Path(lake.root) / "unmounted"
    place.rename(aside)  # storage does not answer
    clock.time += 29
    assert not lease.renew()
    lease.check()
    aside.rename(place)
    assert lease.renew()
    place.rename(aside)
    clock.time += 31
    with pytest.raises(BusyError, match="was lost"):
        lease.check()
    aside.rename(place)
    with pytest.raises(BusyError, match="was lost"):
        lease.check()


def test_a_release_that_fails_does_not_replace_the_error_of_the_run(make_config, capsys):
    cfg = make_config()
    with (
        pytest.raises(GateError, match="refused"),
        stage(cfg, "lease") as context,
        leased(context, config.Lease(seconds=60.0, wait=0.0)),
    ):
        Path(context.lake.path("leases")).rename(Path(context.lake.root) / "unmounted")
        raise GateError("refused")
    assert "the lease could not be released" in capsys.readouterr().err


def test_a_row_of_an_earlier_version_is_read_and_a_lease_of_another_layout_is_named(lake, monkeypatch):
    row = pa.table({"holder": ["old:1:a"], "expires": [1e12], "seconds": [30.0]}, schema=tables.LEASES)
    write_deltalake(lake.path("leases"), row)
    clock = Clock()
    watched(monkeypatch, Lease(lake, 30.0, clock), clock, 11, 60)
    assert 30 <= clock.time - 1_000 <= 44
    write_deltalake(lake.path("leases"), pa.table({"owner": ["x"]}), mode="overwrite", schema_mode="overwrite")
    with pytest.raises(InputError, match=r"leases has columns owner, expected holder, expires, seconds: .* remove it"):
        Lease(lake, 30.0).take(0.0)


PUBLISHER = """
import sys, time
from pathlib import Path
import pyarrow as pa
from adasid import config
from adasid.errors import BusyError
from pipelines.engines.tracking import stage
from pipelines.publish import generations
from pipelines.publish.lease import leased
from tests.unit.test_generations import candidate

runs, folder, checks = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "checks"
with stage(config.build({"name": "t", "runs_dir": runs}), "publisher") as context:
    lake = context.lake

    def write_sids():
        lake.write("sids", pa.schema([("item_id", pa.string())]), pa.table({"item_id": ["late"]}).to_batches(), "late")
        (folder / "at sids").touch()
        while not (folder / "go on").exists():
            time.sleep(0.02)

    with leased(context, config.Lease(seconds=1.0, wait=0.0)) as lease:
        allowed = lease.check if checks else lambda: None
        try:
            generations.publish(context, "late", candidate(generation=1), None, write_sids, None, allowed=allowed)
        except BusyError as error:
            print("busy:", error)
"""


@pytest.mark.parametrize("how", ["checks", "does not check"])
def test_a_process_that_was_stopped_changes_nothing_after_another_has_published(make_config, tmp_path, how):
    """Without its checks, too: the commits themselves fail."""
    cfg = make_config()
    code = [sys.executable, "-c", PUBLISHER, str(cfg.runs_dir), str(tmp_path), how]
    process = subprocess.Popen(code, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "."})
    try:
        limit = time.monotonic() + 60
        while not (tmp_path / "at sids").exists():
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.02)
        process.send_signal(signal.SIGSTOP)
        with stage(cfg, "other") as context, leased(context, config.Lease(seconds=60.0, wait=30.0)) as lease:
            lake = context.lake

            def write_sids():
                rows = pa.table({"item_id": ["good"]})
                lake.write("sids", rows.schema, rows.to_batches(), "good")

            generations.publish(context, "good", candidate(generation=1), None, write_sids, None, allowed=lease.check)
            before = {name: DeltaTable(lake.path(name)).version() for name in ("live", "generations", "sids")}
            (tmp_path / "go on").touch()
            process.send_signal(signal.SIGCONT)
            out, _ = process.communicate(timeout=60)
            assert "busy: " in out and ("lease" in out) == (how == "checks"), out
            lease.check()
        assert before == {name: DeltaTable(lake.path(name)).version() for name in before}
        live = generations.live(lake)
        assert lake.read("sids", live.sids_version)["item_id"].to_pylist() == ["good"]
    finally:
        process.kill()
        process.wait()
