"""Configure a small run, and start, stop and read it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from pipelines import chain
from pipelines.engines.lake import Lake
from tests import s3
from tests.conftest import INTERPRETED, give_store

ROOT = Path(__file__).parents[2]
ITEMS = 600
SMALL = {
    "source": {
        "synthetic": {
            "items": ITEMS,
            "users": 400,
            "interactions": 6000,
            "topics": 8,
            "text_width": 16,
            "visual_width": 12,
            "chunk_users": 200,
        }
    },
    "features": {"pairs": {"method": "cooccurrence", "min_users": 1}, "user_buckets": 2},
    "behavior": {"width": 16, "blocks": 1, "epochs": 3, "batch_users": 64, "negatives": 128, "early_epochs": 3},
    "tokenizer": {
        "codebook_size": 16,
        "latent_width": 16,
        "hidden": [32, 24],
        "decoder_hidden": [24, 32],
        "projector_width": 24,
        "training": {"epochs": 40, "batch": 128, "checkpoint_epochs": 2, "log_epochs": 10},
    },
    "sids": {"gates": {"max_collision": 1.0}},
    "retokenize": {"lease": {"seconds": 6.0, "wait": 60.0}, "exports": ["changes"]},
    "spark": {"shuffle_partitions": 2, "driver_memory": "2g", "conf": INTERPRETED},
    "ray": {"cpus_per_worker": 0.5, "gpus": "never"},
}
TABLES = (
    "items",
    "interactions",
    "truth",
    "item_stats",
    "user_stats",
    "sequences",
    "ranking_samples",
    "behavior_embeddings",
    "item_features",
    "catalog_stats",
    "richness_stats",
    "sids",
    "generations",
    "live",
)


def config_file(folder, name, workers=0, **changes):
    data = {
        **SMALL,
        "name": name,
        "runs_dir": str(folder / "runs"),
        "ray": {**SMALL["ray"], "workers": workers},
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(data))
    give_store(folder / "runs" / name)
    return path


def config_on_s3(folder, name, bucket, **changes):
    """A config whose run lies in a bucket. MLflow's store is in ``folder``; the JVM of the suite, which is older than
    the server, gets the keys of the test by the config."""
    give_store(folder / "mlflow")
    keys = {"access.key": "AWS_ACCESS_KEY_ID", "secret.key": "AWS_SECRET_ACCESS_KEY"}
    conf = {f"spark.hadoop.fs.s3a.{key}": s3.ENVIRONMENT[value] for key, value in keys.items()}
    data = {
        **SMALL,
        "name": name,
        "runs_dir": bucket,
        "spark": {**SMALL["spark"], "conf": {**INTERPRETED, **conf}},
        "ray": {**SMALL["ray"], "workers": 0},
        "tracking": {"uri": f"sqlite:///{folder}/mlflow/mlflow.db"},
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def job(name, path, *arguments):
    return subprocess.run(
        [sys.executable, f"jobs/{name}.py", "--config", path, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=540,
    )


def run_stage(cfg, name):
    """A stage in this process, in the Spark session that is there."""
    with chain.tracking.stage(cfg, name) as context:
        dict(chain.STAGES)[name](cfg, context)


def lake_of(folder, name):
    return Lake(str(folder / "runs" / name / "lake"), {})


def sids(lake):
    return lake.read("sids", columns=["item_id", "codes", "weights", "active", "tokens", "collision_rank"]).sort_by(
        "item_id"
    )


def killed(arguments, ready, deadline=240):
    """Start a job, SIGKILL it with all its processes as soon as ``ready()``; returns whether it was still running
    then."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    end = time.monotonic() + deadline
    while not ready() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    alive = process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)  # the job and its JVM
    process.wait()
    return alive
