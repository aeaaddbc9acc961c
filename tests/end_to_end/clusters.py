"""Start a Spark cluster and a Ray cluster whose machines are folders: each has its own HOME and temporary folder."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pyspark
import pytest

from tests.end_to_end.running import ROOT
from tests.ports import free

RAY = Path(sys.executable).with_name("ray")
_WITHOUT_PROJECT = """import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
"""


@pytest.fixture
def bare_python(tmp_path, monkeypatch):
    """A Python for Spark's executors that has the packages, but cannot import this project."""
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "sitecustomize.py").write_text(_WITHOUT_PROJECT)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}/blocked:$PYTHONPATH" exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    tried = subprocess.run([python, "-c", "import pipelines"], cwd=tmp_path, capture_output=True, text=True)
    assert "No module named 'pipelines'" in tried.stderr
    monkeypatch.setenv("PYSPARK_PYTHON", str(python))
    monkeypatch.delenv("SPARK_SUBMIT_OPTS", raising=False)
    return python


def daemon(name: str, folder: Path, *arguments: str) -> subprocess.Popen:
    """Start a daemon of Spark in its own folder, with its own HOME and temporary folder."""
    for part in ("home", "tmp"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "SPARK_SUBMIT_OPTS"}}
    environment |= {
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "tmp"),
        "SPARK_LOCAL_DIRS": str(folder / "tmp"),
    }
    environment |= {"SPARK_NO_DAEMONIZE": "1", "SPARK_DAEMON_MEMORY": "200m", "OMP_NUM_THREADS": "1"}
    spark_class = Path(pyspark.__file__).parent / "bin" / "spark-class"
    command = [spark_class, f"org.apache.spark.deploy.{name}", "--host", "127.0.0.1", *arguments]
    with (folder / "log").open("w") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)


@pytest.fixture
def cluster(server, tmp_path):
    """The address of a master with two workers of one core."""
    port = free()
    address = f"spark://127.0.0.1:{port}"
    options = ("--port", str(port), "--webui-port", str(free()))
    processes = [daemon("master.Master", tmp_path / "master", *options)]
    for number in (1, 2):
        folder = tmp_path / f"worker{number}"
        size = ("--cores", "1", "--memory", "1200m", "--work-dir", str(folder / "work"))
        processes.append(daemon("worker.Worker", folder, *size, "--webui-port", str(free()), address))
    end = time.monotonic() + 120
    while (tmp_path / "master" / "log").read_text().count("Registering worker") < 2 and time.monotonic() < end:
        time.sleep(0.2)
    yield address
    for process in processes:
        process.kill()
        process.wait()


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


def submit(head: Node, log: Path, *job: str) -> subprocess.Popen:
    """Submit a job; the working directory travels with it."""
    command = [
        RAY,
        "job",
        "submit",
        f"--address=http://127.0.0.1:{head.dashboard}",
        "--working-dir",
        ".",
        "--",
        "python",
        *job,
    ]
    with log.open("w") as file:
        return subprocess.Popen(command, cwd=ROOT, env=head.environment, stdout=file, stderr=file)
