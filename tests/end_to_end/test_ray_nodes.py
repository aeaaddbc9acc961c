"""Train a tokenizer on two Ray nodes that share only a bucket: each has its own HOME and temporary folder, and the
second has no checkout. A worker on the second node and the driver are killed; the training resumes both times.

It takes minutes, so it is one of the drills (`make drills`)."""

import json
import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from adasid.storage import ObjectPath
from tests.end_to_end.clusters import submit
from tests.end_to_end.nights import copied
from tests.end_to_end.running import SMALL

EPOCHS = 200


def epochs(folder: ObjectPath) -> list[int]:
    """Return the epochs whose metrics are in the bucket."""
    metrics = [path for path in folder.files() if path.name == "metrics.jsonl"]
    return [int(json.loads(line)["epoch"]) for path in metrics for line in path.read_text().splitlines()]


def until(condition, process: subprocess.Popen, log: Path, seconds: float = 240) -> None:
    """Wait for a condition while a job runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.1)


@pytest.mark.skipif("ADASID_DRILLS" not in os.environ, reason="a drill: make drills")
def test_a_worker_of_the_second_node_and_the_driver_are_killed_and_training_resumes(nodes, shop, bucket, tmp_path):
    head, second = nodes
    training = {**SMALL["tokenizer"]["training"], "epochs": EPOCHS, "checkpoint_epochs": 10, "log_epochs": 10}
    changes = {
        "tokenizer": {**SMALL["tokenizer"], "training": training},
        "ray": {"workers": 2, "cpus_per_worker": 1, "gpus": "never", "max_failures": 2},
    }
    path, _ = copied(shop, tmp_path / "driver", bucket, **changes)
    before = {str(file) for file in ObjectPath.of(f"{bucket}/shop/artifacts/tokenizer").files()}
    folder = ObjectPath.of(f"{bucket}/shop/artifacts/tokenizer")
    (old,) = {Path(file).parts[6] for file in before if file.endswith("model/manifest.json")}

    def mine() -> ObjectPath:
        return next((inner for inner in folder.folders() if inner.name != old), folder / "none")

    train = ("jobs/train.py", "--config", str(path), "--stage", "tokenizer")
    job = submit(head, tmp_path / "first.log", *train)
    until(lambda: len(epochs(mine())) >= 3, job, tmp_path / "first.log")
    (worker,) = second.workers()
    os.kill(worker, signal.SIGKILL)
    reached = len(epochs(mine()))
    until(lambda: second.workers() not in ([], [worker]), job, tmp_path / "first.log")
    until(lambda: len(epochs(mine())) > reached + 2, job, tmp_path / "first.log")
    assert epochs(mine()) == sorted(set(epochs(mine())))
    drivers = subprocess.run(["pgrep", "-f", f"jobs/train.py --config {path}"], capture_output=True, text=True)
    for driver in drivers.stdout.split():
        with suppress(ProcessLookupError):
            os.kill(int(driver), signal.SIGKILL)
    job.wait(60)
    assert job.returncode != 0
    assert not (mine() / "model" / "manifest.json").exists()
    reached = epochs(mine())
    job = submit(head, tmp_path / "second.log", *train)
    assert job.wait(300) == 0, (tmp_path / "second.log").read_text()[-3000:]
    assert (mine() / "model" / "manifest.json").exists()
    assert epochs(mine())[: len(reached)] == reached
    assert epochs(mine())[-1] == EPOCHS
