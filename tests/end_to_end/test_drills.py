"""Drill failures of the nightly job with real processes: killed at any step, started twice, given broken tables; the
previous table stays live.

``ADASID_DRILLS`` sets the number of kills (`make drills` takes 30), ``ADASID_DRILLS_WHERE=s3`` kills runs that lie in
a bucket (`make drills WHERE=s3`); each result is written at once below
``ADASID_DRILLS_LOG``.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from adasid.config import load
from adasid.files import children, location
from pipelines import cli
from pipelines.nightly import retokenize
from pipelines.publish import generations
from pipelines.publish.lease import Lease
from tests.end_to_end.nights import by_item, copied, follow, merge, next_day, put
from tests.end_to_end.running import ROOT, job

KILLS = int(os.environ.get("ADASID_DRILLS", "2"))
ON_S3 = os.environ.get("ADASID_DRILLS_WHERE") == "s3"
DAY = "2026-02-02"
OPEN = {
    "gates": {"max_churn": 1.0, "max_weighted_churn": 1.0, "max_error_ratio": 100.0},
    "lease": {"seconds": 6.0, "wait": 60.0},
}
SPARK = {**OPEN, "small_night": 0}
WARM, REFIT = ({**OPEN, "policy": policy, "warm": {"epochs": 6}} for policy in ("warm", "refit"))
STEPS = ("leases", "training", "sids", "sid_changes", "generations", "exports", "live")


@pytest.fixture(scope="module")
def evening(tmp_path_factory, shop):
    """A published generation, and features of the day after: what every drill starts from a copy of."""
    folder = tmp_path_factory.mktemp("evening") / "night"
    _, lake = copied(shop, folder, retokenize=OPEN)
    put(lake, next_day(lake.read("item_features"), seed=1), "tomorrow")
    return folder


@pytest.fixture
def tonight(evening, tmp_path):
    """A copy: its config and its lake."""
    return copied(evening, tmp_path / "night", retokenize=OPEN)


@pytest.fixture
def on_spark(evening, tmp_path):
    """A copy whose night is Spark's."""
    return copied(evening, tmp_path / "night", retokenize=SPARK)


def night(path, *arguments):
    return job("retokenize", path, "--run-date", DAY, *arguments)


@pytest.fixture(scope="module")
def merged(tmp_path_factory, shop, spark):
    """The same evening, told by a change feed: a small night."""
    folder = tmp_path_factory.mktemp("merged") / "night"
    _, lake = copied(shop, folder, retokenize=OPEN)
    follow(spark, lake)
    merge(spark, lake, next_day(lake.read("item_features"), seed=1))
    return folder


def ended(evening, folder, settings):
    """The table that every night must end with, and the seconds it took."""
    path, lake = copied(evening, folder / "night", retokenize=settings)
    started = time.monotonic()
    done = night(path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert ("without Spark" in done.stderr) == (settings is OPEN)
    return by_item(lake, generations.live(lake).sids_version), time.monotonic() - started


@pytest.fixture(scope="module")
def undisturbed(evening, tmp_path_factory):
    """How an undisturbed night of Spark ends."""
    return ended(evening, tmp_path_factory.mktemp("undisturbed"), SPARK)


@pytest.fixture(scope="module")
def undisturbed_small(merged, tmp_path_factory):
    """How an undisturbed small night ends."""
    return ended(merged, tmp_path_factory.mktemp("undisturbed"), OPEN)


@pytest.fixture(scope="module")
def undisturbed_warm(evening, tmp_path_factory):
    """How an undisturbed night ends that trains the live tokenizer on."""
    return ended(evening, tmp_path_factory.mktemp("undisturbed"), WARM)


@pytest.fixture(scope="module")
def undisturbed_refit(evening, tmp_path_factory):
    """How an undisturbed night ends that trains a tokenizer anew."""
    return ended(evening, tmp_path_factory.mktemp("undisturbed"), REFIT)


KINDS = (
    (("evening", SPARK, "undisturbed"),),
    (("merged", OPEN, "undisturbed_small"),),
    (("evening", WARM, "undisturbed_warm"), ("evening", REFIT, "undisturbed_refit")),
    (("evening", OPEN, "undisturbed_small"),),
)
"""What is killed in turn: nights of Spark, by feed, that train (warm and refit in turn), and by comparison. Where each
starts, its settings, how it ends."""


def reached(step, lake, run, before):
    """Whether a night has come to a step."""
    if step == "exports":
        inner = children(location(str(run / "exports")))
        return any(path.name == "2" or path.name.startswith(".2.") for path in inner)
    if step == "training":
        return len(list((run / "artifacts" / "tokenizer").glob("*/checkpoints/*/*"))) > before
    return commits(lake, step) > before


def commits(lake, table):
    """Commits of a table so far."""
    return len(list((location(lake.path(table)) / "_delta_log").glob("*.json")))


@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_nightly_run_leaves_the_old_or_the_new_table_and_a_rerun_ends_as_undisturbed(
    number, request, tmp_path
):
    kinds, turn = KINDS[number % len(KINDS)], number // len(KINDS)
    start, settings, end = kinds[turn % len(kinds)]
    bucket = request.getfixturevalue("bucket") if ON_S3 else None
    path, lake = copied(request.getfixturevalue(start), tmp_path / "night", bucket, retokenize=settings)
    expected, seconds = request.getfixturevalue(end)
    before = by_item(lake, generations.live(lake).sids_version)
    rng = np.random.default_rng(number)
    steps = STEPS if settings in (WARM, REFIT) else [step for step in STEPS if step != "training"]
    step = steps[turn % len(steps)] if number % 5 else None  # every fifth at a random time
    had = (
        0 if step in {None, "training"} else commits(lake, step) + (step == "leases")
    )  # the first commit of the lease creates its table
    pause = rng.uniform(0, seconds if step is None else 0.5)
    process = subprocess.Popen(
        [sys.executable, "jobs/retokenize.py", "--config", path, "--run-date", DAY],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    limit = time.monotonic() + 240
    while (
        step
        and not reached(step, lake, load(path).run_dir, had)
        and process.poll() is None
        and time.monotonic() < limit
    ):
        time.sleep(0.005)
    time.sleep(pause)
    alive = process.poll() is None
    if alive:
        os.killpg(process.pid, signal.SIGKILL)  # the night and its JVM
        process.wait()
    left = by_item(lake, generations.live(lake).sids_version)
    assert left.equals(before) or left.equals(expected)
    done = night(path)
    assert done.returncode == 0, done.stderr[-2000:]
    after = by_item(lake, generations.live(lake).sids_version)
    assert after.equals(expected)
    assert [generation.generation for generation in generations.history(lake)] == [1, 2]
    assert (
        len(lake.read("sid_changes")) == generations.live(lake).churn["changed"] + 18
    )  # 12 new and 6 removed: none twice
    if log := os.environ.get("ADASID_DRILLS_LOG"):
        row = {
            "number": number,
            "night": end,
            "step": step,
            "pause": round(float(pause), 3),
            "alive": alive,
            "new table": left.equals(expected),
            "equal": True,
        }
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def test_of_two_nightly_runs_started_together_one_publishes(on_spark, undisturbed):
    path, lake = on_spark
    found = {}

    def start(name, wait):
        found[name] = night(path, "--set", f"retokenize.lease.wait={wait}", "--set", "retokenize.lease.seconds=60")

    threads = [
        threading.Thread(target=start, args=(name, wait))
        for name, wait in (("leaves", 0), ("waits", 200), ("waits too", 200))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    codes = {name: done.returncode for name, done in found.items()}
    assert codes["waits"] == codes["waits too"] == 0 and codes["leaves"] in (0, 5), found
    if codes["leaves"]:
        assert (
            "ERROR shop/retokenize: the lease of" in found["leaves"].stderr and "belongs to" in found["leaves"].stderr
        )
    assert [generation.generation for generation in generations.history(lake)] == [1, 2]
    assert by_item(lake, generations.live(lake).sids_version).equals(undisturbed[0])


def here(path, capsys):
    """A night in this process: exit code and last line."""
    arguments = cli.choose(["--config", str(path)], "retokenize")
    code = cli.run(
        arguments, cli.stage("retokenize", lambda cfg, context: retokenize.run(cfg, context, date.fromisoformat(DAY)))
    )
    return code, capsys.readouterr().err.strip().splitlines()[-1]


def refused(path, lake, capsys, words, code=3):
    """A night that ends in one clear line, with yesterday's table live and readable."""
    before = generations.live(lake)
    found, last = here(path, capsys)
    assert found == code and " ERROR " in last and all(word in last for word in words), last
    assert generations.live(lake) == before
    assert by_item(lake, before.sids_version).num_rows == before.items


def test_a_corrupt_artifact_is_refused(tonight, capsys):
    path, lake = tonight
    weights = load(path).run_dir / generations.live(lake).artifact / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-20] ^= 1
    weights.write_bytes(data)
    refused(path, lake, capsys, ["the weights are damaged"])


@pytest.mark.parametrize("table", ["item_features", "sids"])
def test_a_truncated_file_is_refused(tonight, capsys, table):
    path, lake = tonight
    file = Path(lake.open(table).file_uris()[0])
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    (file.parent / f".{file.name}.crc").unlink(missing_ok=True)
    before = generations.live(lake)
    code, last = here(path, capsys)
    assert code == 3 and all(word in last for word in (" ERROR ", "version", "stays live", file.name[:12])), last
    assert generations.live(lake) == before


def test_a_damaged_change_feed_is_gone_around(merged, tmp_path, undisturbed_small, capsys):
    path, lake = copied(merged, tmp_path / "night", retokenize=OPEN)
    for file in Path(lake.path("item_features")).glob("_change_data/*.parquet"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        (file.parent / f".{file.name}.crc").unlink(missing_ok=True)
    code, last = here(path, capsys)
    assert code == 0 and "detected by fingerprints" in last, last
    names = ["item_id", "codes", "active", "collision_rank", "generation", "fingerprint"]
    assert by_item(lake, None, names).equals(undisturbed_small[0].select(names))


def test_a_table_that_grew_a_column_is_no_trouble_and_one_that_changed_a_type_or_a_width_is_refused(
    on_spark, undisturbed, capsys
):
    path, lake = on_spark
    table = lake.read("item_features")
    place = table.column_names.index("text")
    doubles = table.set_column(place, "text", table["text"].cast(pa.list_(pa.float64())))
    put(lake, doubles, "doubles")
    refused(path, lake, capsys, ["item_features.text is array<double>, it must be array<float>"])
    wider = [[*row, 0.0] if row is not None else None for row in table["text"].to_pylist()]
    put(
        lake,
        table.set_column(place, table.schema.field("text"), pa.array(wider, table.schema.field("text").type)),
        "wider",
    )
    refused(path, lake, capsys, ["item_features.text has width 17, not 16 as the tokenizer", "was trained on"])
    broken = [None if row is None else [float("nan"), *row[1:]] for row in table["text"].to_pylist()]
    prints = pa.array([f"nan{i}" for i in range(table.num_rows)])
    odd = table.set_column(place, table.schema.field("text"), pa.array(broken, table.schema.field("text").type))
    put(lake, odd.set_column(odd.column_names.index("fingerprint"), odd.schema.field("fingerprint"), prints), "nan")
    refused(path, lake, capsys, ["items with vectors that are not finite is"], code=4)
    put(lake, table.append_column("price", pa.array(np.arange(table.num_rows))), "grown")
    assert here(path, capsys)[0] == 0
    assert by_item(lake, generations.live(lake).sids_version).equals(undisturbed[0])


def test_a_nightly_run_after_the_clock_jumped_back_is_as_any_other(
    merged, tmp_path, undisturbed_small, capsys, monkeypatch
):
    path, lake = copied(merged, tmp_path / "night", retokenize=OPEN)
    with monkeypatch.context() as ahead:  # a run that was killed a day ahead
        ahead.setattr("pipelines.publish.lease.time.time", lambda: time.monotonic() + 86_400 * 365 * 80)
        Lease(lake, OPEN["lease"]["seconds"]).take(0)
    assert here(path, capsys)[0] == 0
    assert by_item(lake, generations.live(lake).sids_version).equals(undisturbed_small[0])


@pytest.mark.skipif(KILLS < 3, reason="in `make drills` only")
@pytest.mark.parametrize(
    ("settings", "end"), [(SPARK, "undisturbed"), (OPEN, "undisturbed_small")], ids=["spark", "small"]
)
def test_a_full_disk_ends_in_the_old_or_the_new_table(evening, settings, end, request, tmp_path):
    """On a small file system of its own, where one can be mounted, with next to nothing left."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(small)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        path, lake = copied(evening, small / "night", retokenize=settings)
        expected, _ = request.getfixturevalue(end)
        before = by_item(lake, generations.live(lake).sids_version)
        free = os.statvfs(small)
        (small / "ballast").write_bytes(bytes(free.f_bavail * free.f_frsize - 120_000))
        done = night(path)
        assert done.returncode in (5, 75), done.stderr[-2000:]
        assert " ERROR " in done.stderr.strip().splitlines()[-1], done.stderr[-2000:]
        left = by_item(lake, generations.live(lake).sids_version)
        assert left.equals(before) or left.equals(expected)
        (small / "ballast").unlink()
        time.sleep(OPEN["lease"]["seconds"])
        assert night(path).returncode == 0
        assert by_item(lake, generations.live(lake).sids_version).equals(expected)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=False)
