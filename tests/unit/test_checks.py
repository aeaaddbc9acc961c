"""Test --check on real sources, stores and addresses, and the form of the lines."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from deltalake import write_deltalake

from adasid.errors import GateError
from pipelines import cli, log
from tests.conftest import give_store

ROOT = Path(__file__).parents[2]
ITEMS = pa.table({"item_id": ["a", "b"], "text": pa.array([[0.1, 0.2], [0.3, 0.4]], pa.list_(pa.float32()))})
EVENTS = pa.table({"user_id": ["u", "v"], "item_id": ["a", "b"], "timestamp": [1_600_000_000, 1_600_000_001]})


@pytest.fixture
def shop(tmp_path):
    """A folder with a source as Parquet; ``check`` runs the checks of a job on it."""
    for name, rows in (("items", ITEMS), ("interactions", EVENTS)):
        pq.write_table(rows, tmp_path / f"{name}.parquet")
    return tmp_path


def config_of(folder, form="parquet", **sections):
    ending = ".parquet" if form == "parquet" else ""
    paths = {name: f"{folder}/{name}{ending}" for name in ("items", "interactions")}
    tables = {"kind": "tables", "tables": {**paths, "format": form}}
    data = {"name": "mine", "runs_dir": f"{folder}/runs", "source": tables, "features": {"content": ["text"]}}
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({**data, **sections}))
    return path


def check(path, capsys, job="ingest"):
    """The exit code, and check -> (level, text)."""
    before = {file: file.read_bytes() for file in path.parent.rglob("*") if file.is_file()}
    arguments = cli.parser("").parse_args(["--config", str(path), "--check"])
    arguments.job = job
    capsys.readouterr()
    code = cli.run(arguments, lambda cfg: pytest.fail("the job ran"))
    assert {file: file.read_bytes() for file in path.parent.rglob("*") if file.is_file()} == before
    lines = [re.fullmatch(rf"20\S+Z (\w+) +mine/{job}: (.*)", line) for line in capsys.readouterr().err.splitlines()]
    assert all(lines)
    return code, {re.match(r"(.*?)(?: ok|:)", m[2])[1]: (m[1], m[2]) for m in lines if m[1] != "WARN"}


def test_each_check_has_a_line_and_nothing_is_written(shop, capsys):
    path = config_of(shop)
    code, found = check(path, capsys)
    assert code == 0 and {level for level, _ in found.values()} == {"INFO"}
    assert list(found) == ["config", "versions", "spark", "java", "jars", "source", "storage", "lake", "mlflow"]
    assert found["source"][1] == "source ok: source.tables.items 1 files; source.tables.interactions 1 files"
    assert "lake ok: no table yet" in found["lake"][1] and "does not exist yet" in found["mlflow"][1]
    assert list(check(path, capsys, "report")[1]) == ["config", "versions", "storage", "lake", "mlflow"]
    assert "hadoop-aws" not in found["jars"][1]
    give_store(shop / "runs" / "mine")
    assert check(path, capsys)[1]["mlflow"][1].endswith("mlflow.db")


def test_the_jars_of_s3_are_needed_where_a_source_lies_there(shop, capsys):
    tables = {"items": "s3://none-such/items", "interactions": f"{shop}/interactions.parquet"}
    path = config_of(shop, source={"kind": "tables", "tables": tables})
    assert "hadoop-aws" in check(path, capsys, "write_sids")[1]["jars"][1]


@pytest.mark.parametrize("form", ["parquet", "delta"])
def test_the_schema_of_a_source_is_checked(shop, capsys, form):
    rows = EVENTS.drop_columns(["user_id"])
    for name, table in (("items", ITEMS), ("interactions", rows)):
        if form == "delta":
            write_deltalake(shop / name, table)
        else:
            pq.write_table(table, shop / f"{name}.parquet")
    code, found = check(config_of(shop, form), capsys)
    assert code == 3 and "column 'user_id' is missing (found: item_id, timestamp)" in found["source"][1]
    code, found = check(config_of(shop, form, features={"content": ["image"]}), capsys)
    assert code == 3 and "column 'image' is missing" in found["source"][1]


def test_a_type_and_a_path_of_a_source_are_checked(shop, capsys):
    pq.write_table(EVENTS.set_column(0, "user_id", pa.array([1.5, 2.5])), shop / "interactions.parquet")
    code, found = check(config_of(shop), capsys)
    assert code == 3 and "column 'user_id' is double" in found["source"][1]
    (shop / "items.parquet").unlink()
    code, found = check(config_of(shop), capsys)
    assert code == 3 and "items.parquet: does not exist" in found["source"][1]
    code, found = check(config_of(shop), capsys, "retokenize")
    assert code == 0 and "source" not in found


def test_the_first_fault_gives_the_code_and_all_faults_have_a_line(shop, capsys, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    away = {"tracking": {"uri": f"http://me:pa55word@127.0.0.1:{port}"}, "ray": {"address": f"127.0.0.1:{port}"}}
    code, found = check(config_of(shop, **away), capsys, "run_all")
    assert code == 75 and "refused" in found["mlflow"][1] and "pa55word" not in found["mlflow"][1]
    assert found["ray address"][1].startswith(f"ray address: no Ray cluster at 127.0.0.1:{port} (")
    monkeypatch.setenv("JAVA_HOME", str(shop / "none"))
    code, found = check(config_of(shop, **away), capsys, "run_all")
    assert code == 3 and "none/bin/java does not exist; install Java 17" in found["java"][1]


def test_a_damaged_store_and_a_newer_lake_are_faults(shop, capsys):
    path, run = config_of(shop), shop / "runs" / "mine"
    (run / "lake").mkdir(parents=True)
    (run / "lake" / "format.json").write_text('{"format": 99}')
    (run / "mlflow.db").write_text("not a database, whatever its name says")
    code, found = check(path, capsys)
    assert code == 3 and "has format 99" in found["lake"][1] and "not a database" in found["mlflow"][1]


@pytest.mark.parametrize("job", ["ingest", "maintain", "report"])
def test_a_job_checks_itself(shop, job):
    words = [sys.executable, ROOT / "jobs" / f"{job}.py", "--config", config_of(shop), "--check"]
    done = subprocess.run(words, cwd=shop, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("source ok" in done.stderr) == (job == "ingest") and f"mine/{job}: config ok" in done.stderr
    assert not (shop / "runs").exists() and not (shop / "mlruns").exists()


def test_lines_are_json_where_asked_for(shop, capsys, monkeypatch):
    monkeypatch.setenv("ADASID_LOG", "json")

    def refuse(cfg, context):
        context.note("half done")
        context.facts["items"] = 3
        if cfg.seed == 1:
            raise GateError("s3://me:pa55word@bucket: churn is 0.5,\nallowed 0.1")

    path = config_of(shop)
    give_store(shop / "runs" / "mine")
    for seed, end in ((17, 0), (1, 4)):
        arguments = cli.parser("").parse_args(["--config", str(path), "--set", f"seed={seed}"])
        assert cli.run(arguments, cli.stage("retokenize", refuse)) == end
    half, done, _, error = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line[:1] == "{"]
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", half.pop("time"))
    assert half == {"level": "INFO", "run": "mine", "stage": "retokenize", "message": "half done"}
    assert done["message"].startswith("done in ") and done["facts"] == {"items": 3}
    assert error["level"] == "ERROR" and error["message"] == "s3://bucket: churn is 0.5,\nallowed 0.1"


def test_a_line_is_one_line_with_its_figures_at_the_end(capsys):
    before = log.place("mine", "sids")
    log.line("two\nlines", "WARN", facts={"items": 3, "churn": "0.1 %"})
    log.place(*before)
    assert re.fullmatch(r"20\S+Z WARN  mine/sids: two lines \| items 3 \| churn 0\.1 %\n", capsys.readouterr().err)
