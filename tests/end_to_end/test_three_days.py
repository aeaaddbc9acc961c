"""Run three days of a catalogue through the files of infra/: what the source adds, changes and removes is in ``sids``
the next day."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from adasid.config import load
from pipelines import chain
from pipelines.publish import generations
from tests.conftest import INTERPRETED, give_store
from tests.end_to_end.nights import rows_of
from tests.end_to_end.running import ROOT, lake_of, run_stage

WIDTH, GROUPS, USERS = 12, 6, 60
DAYS = ("2026-03-01", "2026-03-02", "2026-03-03")
SETTINGS = {
    "features": {"content": ["text"], "user_buckets": 2},
    "behavior": {"width": 8, "blocks": 1, "epochs": 1, "batch_users": 32, "negatives": 32},
    "tokenizer": {"name": "rq-kmeans", "content": ["text"], "levels": 3, "codebook_size": 8, "rounds": 5},
    "retokenize": {"exports": ["changes"]},
    "spark": {"master": "local[2]", "driver_memory": "1g", "shuffle_partitions": 1, "conf": INTERPRETED},
    "ray": {"workers": 0, "gpus": "never"},
}


class Source:
    """Items near the centre of their group, and users who like two groups."""

    def __init__(self, folder):
        self.folder, self.rng = folder, np.random.default_rng(7)
        self.centres = self.rng.normal(size=(GROUPS, WIDTH))
        self.items = {f"i{number:03}": self.vector(number) for number in range(72)}
        self.write()

    def vector(self, number):
        return (self.centres[number % GROUPS] + 0.3 * self.rng.normal(size=WIDTH)).astype(np.float32)

    def write(self):
        """Both tables; the events of an item follow from its id alone."""
        ids = list(self.items)
        items = pa.table({"item_id": ids, "text": [self.items[item].tolist() for item in ids]})
        pq.write_table(items, self.folder / "items.parquet")
        pairs = [(int(item[1:]), k) for item in ids for k in range(6)]
        events = {
            "user_id": [f"u{(7 * number + 11 * k) % USERS:02}" for number, k in pairs],
            "item_id": [f"i{number:03}" for number, _ in pairs],
            "timestamp": [1_700_000_000 + 86_400 * k + number for number, k in pairs],
        }
        pq.write_table(pa.table(events), self.folder / "interactions.parquet")

    def next_day(self, day):
        """Ids that were added, changed and removed."""
        ids = list(self.items)
        added = [f"i{100 + 10 * day + k}" for k in range(3)]
        changed, removed = ids[3 * day : 3 * day + 2], ids[30 + 2 * day : 32 + 2 * day]
        for item in removed:
            del self.items[item]
        for item in (*changed, *added):
            self.items[item] = self.vector(int(item[1:]))
        self.write()
        return added, changed, removed


@pytest.fixture(scope="module")
def published(spark, tmp_path_factory):
    """The source, the lake, and the environment of the schedulers."""
    folder = tmp_path_factory.mktemp("days")
    source, path = Source(folder), folder / "days.yaml"
    files = {name: str(folder / f"{name}.parquet") for name in ("items", "interactions")}
    tables = {"kind": "tables", "tables": {**files, "format": "parquet"}}
    give_store(folder / "runs" / "days")
    path.write_text(yaml.safe_dump({"name": "days", "runs_dir": str(folder / "runs"), "source": tables, **SETTINGS}))
    cfg = load(path)
    for name, _ in chain.STAGES:
        run_stage(cfg, name)
    names = {"ADASID_HOME": str(ROOT), "ADASID_CONFIG": str(path), "ADASID_DRIVER_MEMORY": "1g"}
    return source, lake_of(folder, "days"), {**os.environ, **names}


def ran(words, environment):
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr  # spark-submit prints all that a job says


def by_timer(environment, day, monkeypatch):
    return ran(["infra/systemd/nightly.sh", day], environment)


def by_dag(environment, day, monkeypatch):
    """The commands of the DAG, in its order, with what Airflow puts in for ``ds``."""
    commands = []

    class BashOperator:
        def __init__(self, task_id, bash_command, cwd, append_env, **options):
            assert append_env and cwd == str(ROOT)
            commands.append(bash_command.replace("{{ ds }}", day))

        def __rshift__(self, other):
            return other

    class DAG:
        def __init__(self, *arguments, **options):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    for name in ("airflow", "airflow.providers", "airflow.providers.standard", "airflow.providers.standard.operators"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    faults = [type(name, (Exception,), {}) for name in ("AirflowException", "AirflowFailException")]
    parts = {"airflow.providers.standard.operators.bash": [BashOperator], "airflow.sdk": [DAG]}
    for name, members in {**parts, "airflow.exceptions": faults}.items():
        module = ModuleType(name)
        for part in members:
            setattr(module, part.__name__, part)
        monkeypatch.setitem(sys.modules, name, module)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    spec = importlib.util.spec_from_file_location("dag", ROOT / "infra" / "airflow" / "adasid_nightly.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert len(commands) == 6 and "{{" not in "".join(commands)
    return "".join(ran(["bash", "-c", command], environment) for command in commands)


def by_application(environment, day, monkeypatch):
    """The Spark application of Kubernetes, on this machine."""
    environment = {**environment, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    submit = ["spark-submit", "--driver-memory", "1g", "infra/kubernetes/night.py"]
    words = ["--config", environment["ADASID_CONFIG"], "--run-date", day, "--set", "retokenize.policy=frozen"]
    return ran([*submit, *words], environment)


def test_what_the_source_adds_changes_and_removes_is_published_the_next_day(published, monkeypatch):
    source, lake, environment = published
    for number, (day, run) in enumerate(zip(DAYS, (by_timer, by_dag, by_application)), start=1):
        before = rows_of(lake.read("sids", generations.live(lake).sids_version))
        added, changed, removed = source.next_day(number)
        with monkeypatch.context() as patch:
            said = run(environment, day, patch)
        row = generations.live(lake)
        page = (Path(lake.root).parent / "report" / "explore" / "index.html").read_text(encoding="utf-8")
        assert f'"generation":{row.generation},' in page
        after = rows_of(lake.read("sids", row.sids_version))
        assert (row.generation, row.run_date, row.policy) == (number + 1, day, "frozen"), said[-3000:]
        assert set(after) == set(source.items) == (set(before) | set(added)) - set(removed)
        for item in changed:
            assert after[item]["fingerprint"] != before[item]["fingerprint"]
        for item in set(before) - {*changed, *removed}:
            for name in ("codes", "collision_rank"):
                assert after[item][name] == before[item][name], item
        assert f"{3 * number} of {len(after)} items have training events but no behaviour embedding" in said
        assert re.search(r"behavior_embeddings version \d+ lags behind sequences", said)
