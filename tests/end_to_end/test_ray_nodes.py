"""Train a tokenizer on two Ray nodes that share only a bucket: each has its own HOME and temporary folder, and the
second has no checkout. A worker on the second node and the driver are killed; the training resumes both times.

It takes minutes, so it is one of the drills (`make drills`)."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from adasid.storage import ObjectPath
from tests.end_to_end.nights import copied
from tests.end_to_end.running import ROOT, SMALL
from tests.ports import free

EPOCHS = 200
RAY = Path(sys.executable).with_name("ray")


class Node:
    """A Ray node in its own folder. ``head``: the address of the head, none for the head itself."""

    def __init__(self, folder: Path, token: Path, head: str = "") -> None:
        self.folder, self.dashboard, port = folder, free(), free()
        (folder / "home").mkdir(parents=True)
        self.environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        self.environment |= {"HOME": str(folder / "home"), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        self.environment["PATH"] = f"{RAY.parent}:{os.environ['PATH']}"
        self.environment |= {"ADASID_NODE": folder.name, "OMP_NUM_THREADS": "1", "RAY_TRAIN_V2_ENABLED": "1"}
        ports = ("dashboard-agent-grpc", "runtime-env-agent", "metrics-export", "dashboard-agent-listen")
        options = ["--block", "--num-cpus=1", "--num-gpus=0", "--node-ip-address=127.0.0.1", "--disable-usage-stats"]
        options += [
            f"--temp-dir={folder}/t",
            "--object-store-memory=100000000",
            *(f"--{p}-port={free()}" for p in ports),
        ]
        role = [f"--address={head}"] if head else ["--head", f"--port={port}", f"--dashboard-port={self.dashboard}"]
        self.address = head or f"127.0.0.1:{port}"
        with (folder / "log").open("w") as log:
            command = [RAY, "start", *role, *options]
            self.process = subprocess.Popen(
                command, cwd=folder, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def workers(self) -> list[int]:
        """Return the processes of training workers on this node."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                environment = (process / "environ").read_bytes()
                title = (process / "cmdline").read_bytes()
                if f"ADASID_NODE={self.folder.name}".encode() in environment and b"RayTrainWorker" in title:
                    found.append(int(process.name))
        return found

    def stop(self) -> None:
        """Kill the node with all its processes."""
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if f"HOME={self.folder}/home".encode() in (process / "environ").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def nodes(server, tmp_path_factory):
    """The head and a second node."""
    folder = tmp_path_factory.mktemp("r")
    token = folder / "token"
    token.write_text("0123456789abcdef" * 4)
    head = Node(folder / "1", token)
    end = time.monotonic() + 120
    while "Ray runtime started" not in (folder / "1" / "log").read_text() and time.monotonic() < end:
        time.sleep(0.2)
    second = Node(folder / "2", token, head.address)
    while "Ray runtime started" not in (folder / "2" / "log").read_text() and time.monotonic() < end:
        time.sleep(0.2)
    until_open(head.dashboard)
    yield head, second
    second.stop()
    head.stop()


def until_open(port: int, seconds: float = 120) -> None:
    """Wait for a server."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.2)


def submit(head: Node, path: Path, log: Path) -> subprocess.Popen:
    """Submit the training; the working directory travels with it."""
    job = ["python", "jobs/train.py", "--config", str(path), "--stage", "tokenizer"]
    command = [RAY, "job", "submit", f"--address=http://127.0.0.1:{head.dashboard}", "--working-dir", ".", "--", *job]
    with log.open("w") as file:
        return subprocess.Popen(command, cwd=ROOT, env=head.environment, stdout=file, stderr=file)


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

    job = submit(head, path, tmp_path / "first.log")
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
    job = submit(head, path, tmp_path / "second.log")
    assert job.wait(300) == 0, (tmp_path / "second.log").read_text()[-3000:]
    assert (mine() / "model" / "manifest.json").exists()
    assert epochs(mine())[: len(reached)] == reached
    assert epochs(mine())[-1] == EPOCHS
