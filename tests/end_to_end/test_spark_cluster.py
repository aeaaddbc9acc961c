"""Run a nightly run on a standalone Spark cluster whose two workers share only a bucket with the driver: each has its
own work folder, HOME and temporary folder, and a Python that cannot import this project."""

from datetime import date

from adasid.config import load
from pipelines.engines import tracking
from pipelines.nightly import retokenize
from pipelines.publish import generations
from tests.conftest import INTERPRETED
from tests.end_to_end.nights import by_item, copied, next_day, put
from tests.end_to_end.running import SMALL, job

SPARK = {
    "small_night": 0,
    "exports": ["changes"],
    "gates": {"max_churn": 1.0, "max_weighted_churn": 1.0, "max_error_ratio": 100.0},
}


def test_a_nightly_run_on_a_cluster_that_shares_only_a_bucket(cluster, bare_python, shop, spark, bucket, tmp_path):
    conf = {"spark.executor.memory": "700m", "spark.driver.host": "127.0.0.1"}
    engine = {**SMALL["spark"], "master": cluster, "conf": {**INTERPRETED, **conf}}
    path, lake = copied(shop, tmp_path / "driver", bucket, retokenize=SPARK, spark=engine)
    put(lake, next_day(lake.read("item_features"), seed=1), "tomorrow")
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
