"""Run the README's section for a user's tables verbatim, on Delta tables with ratings. Training stays in the process;
tests/ray covers Ray."""

import json
import re
import shlex
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from deltalake import write_deltalake

from tests.end_to_end.running import ROOT

ITEMS, USERS, EVENTS, TOPICS = 800, 500, 12, 20


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Items in topics, every fifth of which is rated low, and users with two topics of their own."""
    folder, rng = tmp_path_factory.mktemp("mine"), np.random.default_rng(5)
    topic, own = np.arange(ITEMS) % TOPICS, rng.integers(0, TOPICS, (USERS, 2))
    text = (np.eye(TOPICS)[topic] + rng.normal(0, 0.1, (ITEMS, TOPICS))).astype(np.float32)
    items = pa.table(
        {
            "item_id": [f"i{item:04}" for item in range(ITEMS)],
            "text": list(text),
            "title": [f"topic {t}" for t in topic],
        }
    )
    chosen = np.where(
        rng.random((USERS, EVENTS)) < 0.8,
        np.take_along_axis(own, rng.integers(0, 2, (USERS, EVENTS)), axis=1),
        rng.integers(0, TOPICS, (USERS, EVENTS)),
    )
    item = chosen + TOPICS * (rng.random((USERS, EVENTS)) ** 2 * (ITEMS // TOPICS)).astype(int)
    events = pa.table(
        {
            "user_id": np.repeat([f"u{user:04}" for user in range(USERS)], EVENTS),
            "item_id": [f"i{number:04}" for number in item.reshape(-1)],
            "timestamp": (
                1_700_000_000 + 86_400 * np.tile(np.arange(EVENTS), USERS) + np.repeat(np.arange(USERS), EVENTS)
            ).astype(np.int64),
            "rating": np.where(chosen % 5 == 0, 2.0, 5.0).reshape(-1),
        }
    )
    for name, table in (("items", items), ("interactions", events)):
        write_deltalake(folder / name, table)
    return folder


def test_tables_of_ones_own_become_sids_and_metrics_as_the_readme_says(tables):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (written,) = re.findall(r"```yaml\n# mine\.yaml\n(.*?)```", text, re.DOTALL)
    (typed,) = re.findall(r"```sh\n(python jobs/run_all\.py --config mine\.yaml.*?)```", text, re.DOTALL)
    (tables / "mine.yaml").write_text(written.replace("/data/", f"{tables}/"), encoding="utf-8")
    said = []
    for line in typed.splitlines():
        python, *arguments = shlex.split(line, comments=True)
        assert python == "python"
        arguments = [str(tables / word) if word == "mine.yaml" else word for word in arguments]
        done = subprocess.run(
            [sys.executable, *arguments, "--set", f"runs_dir={tables}/runs", "--set", "ray.workers=0"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=540,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        said.append((done.stdout + done.stderr).strip().splitlines()[-1])
    _, retrieval, ranking = said
    assert float(re.search(r"test recall@10 ([\d.]+)", retrieval)[1]) > 3 * 10 / ITEMS
    assert 0.5 < float(re.search(r"test auc ([\d.]+)", ranking)[1]) <= 1  # a topic decides the rating
    assert "labels ratings | split global_time" in ranking
    (result,) = (tables / "runs" / "mine" / "artifacts" / "retrieval").glob("*/result.json")
    strata = json.loads(result.read_text(encoding="utf-8"))["strata"]
    low, high = strata["all"]["intervals"]["recall@10"]
    assert {"all", "head", "mid", "tail"} <= set(strata)
    assert low <= strata["all"]["recall@10"] <= high
    assert (tables / "runs" / "mine" / "report" / "index.html").exists()
