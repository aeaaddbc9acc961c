"""Provide the fixtures that all test folders share: one Spark session for the suite, small configs, the real data where
present."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from adasid.config import Config, build
from tests import s3

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # the suite runs in two processes: more threads than cores only wait for each other

# Jobs live for seconds: what the second JIT compiler would gain is less than it costs on two cores. The suite's own
# session lives for minutes, which it makes a quarter shorter.
# spark-submit starts its JVM itself, so it is told of the class archive here.
_ARCHIVE = Path(importlib.util.find_spec("pyspark").origin).with_name("adasid-classes.jsa")
_FIRST_COMPILER = "-XX:TieredStopAtLevel=1 "
os.environ.setdefault(
    "SPARK_SUBMIT_OPTS", f"{_FIRST_COMPILER}-XX:+UseSerialGC -XX:SharedArchiveFile={_ARCHIVE} -Xlog:disable"
)

INTERPRETED = {
    "spark.sql.codegen.wholeStage": "false",
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
    "spark.sql.adaptive.enabled": "false",
    "spark.databricks.delta.snapshotPartitions": "1",
}
"""Spark settings for tables of a few rows, which run faster than they compile or are planned again."""
DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def spark():
    from adasid.config import Spark
    from pipelines.engines.spark import session

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARK_SUBMIT_OPTS", os.environ["SPARK_SUBMIT_OPTS"].replace(_FIRST_COMPILER, ""))
        spark = session(Spark(master="local[2]", driver_memory="2g", shuffle_partitions=2, conf=INTERPRETED), "tests")
    yield spark
    spark.stop()


@pytest.fixture(scope="session")
def server() -> Iterator[int]:
    """Serve S3 on loopback, and set the environment of its clients; return the port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.s3", "0", "lake"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    port = int(process.stdout.readline())
    before = {name: os.environ.get(name) for name in s3.environment(port)}
    os.environ.update(s3.environment(port))
    s3.ask(port, "/_ready")
    yield port
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    process.kill()
    process.wait()


@pytest.fixture
def bucket(server: int) -> str:
    """Return the URI of an empty prefix of a bucket."""
    return f"s3://lake/{uuid.uuid4().hex}"


@pytest.fixture
def lake(tmp_path: Path):
    from pipelines.engines.lake import Lake

    return Lake(str(tmp_path / "lake"), {})


@cache
def _store() -> bytes:
    """Return an MLflow store without runs: creating its tables takes seconds, copying them none."""
    from mlflow import MlflowClient

    with TemporaryDirectory() as folder:
        MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()
        return (Path(folder) / "mlflow.db").read_bytes()


def give_store(run: Path) -> None:
    """Put an MLflow store without runs into the folder of a run that has none."""
    if not (run / "mlflow.db").exists():
        run.mkdir(parents=True, exist_ok=True)
        (run / "mlflow.db").write_bytes(_store())


@pytest.fixture
def make_config(tmp_path: Path):
    """Build a config whose runs live in the test's own folder."""

    def make(**sections: Any) -> Config:
        few = {"spark": {"shuffle_partitions": 2}, "features": {"user_buckets": 2}}  # tables of a few rows
        small = {name: {**section, **sections.get(name, {})} for name, section in few.items()}
        cfg = build({"name": "t", "runs_dir": str(tmp_path / "runs"), **sections, **small})
        give_store(cfg.run_dir)
        return cfg

    return make


@pytest.fixture(scope="session")
def real_data():
    """Folder of the real data sets; the test is skipped with the reason where they are absent."""
    if not DATA.is_dir():
        pytest.skip(f"real data not present: {DATA}")
    return DATA
