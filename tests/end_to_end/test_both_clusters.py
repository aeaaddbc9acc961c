"""Run the whole chain and a nightly run that trains on a Spark cluster and two Ray nodes at once, which share only a
bucket with each other. The catalogue is that of conf/demo.yaml, so it is one of the drills (`make drills`)."""

import os

import pytest
import yaml

from adasid import config
from adasid.config import load
from pipelines.publish import generations
from pipelines.run import Run
from tests.end_to_end.clusters import submit
from tests.end_to_end.nights import by_item, next_day, put
from tests.end_to_end.running import ROOT

NIGHT = {
    "policy": "refit",
    "exports": ["changes"],
    "gates": {"max_churn": 1.0, "max_weighted_churn": 1.0, "max_error_ratio": 100.0},
}


def written(folder, **changes) -> config.Config:
    """The demo's config with ``changes``, in ``folder``."""
    data = yaml.safe_load((ROOT / "conf" / "demo.yaml").read_text())
    del data["compare"], data["evaluate"]
    data |= {"ray": {"workers": 2, "cpus_per_worker": 1, "gpus": "never"}, "retokenize": NIGHT, **changes}
    path = folder / "demo.yaml"
    path.write_text(yaml.safe_dump(data))
    return load(path)


@pytest.mark.skipif("ADASID_DRILLS" not in os.environ, reason="a drill: make drills")
def test_the_demo_and_a_nightly_run_on_both_clusters(bare_python, cluster, nodes, bucket, tmp_path):
    conf = {"spark.executor.memory": "1000m", "spark.driver.host": "127.0.0.1"}
    cfg = written(tmp_path, runs_dir=bucket, spark={"master": cluster, "driver_memory": "1g", "conf": conf})
    head, second = nodes
    seen = {}
    for name, *job in (
        ("chain", "jobs/run_all.py"),
        ("night", "jobs/retokenize.py", "--run-date", "2026-02-02"),
    ):
        log = tmp_path / f"{name}.log"
        started = submit(head, log, job[0], "--config", str(tmp_path / "demo.yaml"), *job[1:])
        trained = set()
        while started.poll() is None:
            trained |= {node.folder.name for node in nodes if node.workers()}
        assert started.returncode == 0, log.read_text()[-3000:]
        assert trained == {head.folder.name, second.folder.name}
        executors = {path.parent for n in (1, 2) for path in (tmp_path / f"worker{n}" / "work").glob("app-*/*")}
        seen[name] = len(executors)
        lake = Run(cfg).lake
        if name == "chain":
            put(lake, next_day(lake.read("item_features"), seed=1), "tomorrow")
    assert seen["night"] > seen["chain"] >= 1
    lake = Run(cfg).lake
    live = generations.live(lake)
    assert live.generation == 2
    today = lake.read("item_features", columns=["item_id"]).sort_by("item_id").combine_chunks()
    assert by_item(lake, live.sids_version, ["item_id"]).equals(today)
