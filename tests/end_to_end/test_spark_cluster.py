"""Run a nightly run on a standalone Spark cluster whose two workers share only a bucket with the driver: each has its
own work folder, HOME and temporary folder, and a Python that cannot import this project."""

import os
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import pyspark
import pytest

from adasid.config import load
from pipelines.engines import tracking
from pipelines.nightly import retokenize
from pipelines.publish import generations
from tests.conftest import INTERPRETED
from tests.end_to_end.nights import by_item, copied, next_day, put
from tests.end_to_end.running import SMALL, job
from tests.ports import free

SPARK = {
    "small_night": 0,
    "exports": ["changes"],
    "gates": {"max_churn": 1.0, "max_weighted_churn": 1.0, "max_error_ratio": 100.0},
}
_WITHOUT_PROJECT = """import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
"""


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


def test_a_nightly_run_on_a_cluster_that_shares_only_a_bucket(cluster, shop, spark, bucket, tmp_path, monkeypatch):
    conf = {"spark.executor.memory": "700m", "spark.driver.host": "127.0.0.1"}
    engine = {**SMALL["spark"], "master": cluster, "conf": {**INTERPRETED, **conf}}
    path, lake = copied(shop, tmp_path / "driver", bucket, retokenize=SPARK, spark=engine)
    put(lake, next_day(lake.read("item_features"), seed=1), "tomorrow")
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "sitecustomize.py").write_text(_WITHOUT_PROJECT)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}/blocked:$PYTHONPATH" exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("PYSPARK_PYTHON", str(python))
    monkeypatch.delenv("SPARK_SUBMIT_OPTS")
    ids = subprocess.run([python, "-c", "import pipelines"], cwd=tmp_path, capture_output=True, text=True)
    assert "No module named 'pipelines'" in ids.stderr
    done = job("retokenize", path, "--run-date", "2026-02-02")
    assert done.returncode == 0, done.stderr[-3000:]
    executors = [folder for number in (1, 2) for folder in (tmp_path / f"worker{number}" / "work").glob("app-*/*")]
    assert len(executors) == 2
    there = by_item(lake, generations.live(lake).sids_version)
    path, lake = copied(shop, tmp_path / "alone", retokenize=SPARK)
    put(lake, next_day(lake.read("item_features"), seed=1), "tomorrow")
    cfg = load(path)
    with tracking.stage(cfg, "retokenize") as context:
        retokenize.run(cfg, context, date(2026, 2, 2))
    assert by_item(lake, generations.live(lake).sids_version).equals(there)
