"""Test that a user is removed from a lake: from every version, from the log, from messages; on real Delta tables."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from deltalake import DeltaTable, write_deltalake

from adasid import tables
from adasid.errors import InputError, TransientError
from pipelines.engines.lake import properties
from pipelines.engines.tracking import stage
from pipelines.nightly.forget import forget

ROOT = Path(__file__).parents[2]
USERS = ("Zoë O'Hara", 'q"uo\\te', "u1", "用户 7")
OTHERS = ("u10", "O''Hara", "other")


def interactions(users, note):
    return pa.Table.from_pylist(
        [{"user_id": user, "item_id": f"i{n}-{note}", "timestamp": "1", "pos": n} for n, user in enumerate(users)],
        tables.INTERACTIONS,
    )


def rejected(rows):
    return pa.Table.from_pylist(
        [
            {"input_hash": "h", "table": "interactions", "row_hash": f"hash{n}", "reason": "r", "row": row, "copies": 1}
            for n, row in enumerate(rows)
        ],
        tables.REJECTED_ROWS,
    )


def fill(lake):
    """Tables with users, at two versions each, the newer compacted; one without; a checkpoint in the log."""
    for number in (1, 2):
        rows = interactions([*USERS, *OTHERS], number)
        lake.write("interactions", rows.schema, rows.to_batches(), f"ingest {number}")
        stats = pa.table(
            {"user_id": [*USERS, *OTHERS], "user_index": range(7), "interactions": [1] * 7, "items": [1] * 7},
            schema=tables.USER_STATS,
        )
        lake.write("user_stats", stats.schema, stats.to_batches(), f"features {number}", {"interactions": number - 1})
    write_deltalake(lake.path("user_stats"), stats.slice(6), mode="append", commit_properties=properties("features 2"))
    DeltaTable(lake.path("user_stats")).create_checkpoint()
    rows = [json.dumps({"user_id": user, "item_id": "x"}, ensure_ascii=False) for user in (*USERS, *OTHERS)]
    lines = [json.dumps({"line": f"{{'reviewerID': '{user}', broken"}, ensure_ascii=False) for user in ("u1", "u10")]
    refused = rejected([*rows, *lines, json.dumps({"item_id": "u1"})])
    lake.write("rejected_rows", refused.schema, refused.to_batches(), "ingest 2")
    items = pa.table({"item_id": ["u1"]})
    lake.write("items", items.schema, items.to_batches(), "ingest 2")


def strings(value):
    """All texts within a value of a table."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for inner in (*value, *value.values()) for text in strings(inner))
    elif isinstance(value, (list, tuple)):
        yield from (text for inner in value for text in strings(inner))


def texts(folder):
    """File -> every text in it: of all cells of every Parquet file, checkpoints too, and of every file of the logs."""
    for file in Path(folder).rglob("*"):
        if file.suffix == ".parquet":
            table = pq.read_table(file)
            for name in table.column_names:
                yield from ((file, text) for text in strings(table[name].to_pylist()))
        elif file.is_file() and "_delta_log" in file.parts:
            yield file, file.read_text(encoding="utf-8", errors="replace")


def mentions(folder, user):
    """Files that have the id, however it is escaped."""
    forms = {user, json.dumps(user)[1:-1], json.dumps(user, ensure_ascii=False)[1:-1]}
    forms |= {json.dumps(form)[1:-1] for form in forms}
    return {file.name for file, text in texts(folder) if any(form in text for form in forms)}


def run(cfg, users, files=()):
    with stage(cfg, "forget") as context:
        forget(cfg, context, users, files)
    return context


def test_no_file_of_the_lake_names_the_user_afterwards_and_a_second_run_does_nothing(make_config, capsys):
    cfg = make_config()
    with stage(cfg, "fill") as context:
        lake = context.lake
        fill(lake)
    wanted = [user for user in USERS if user != "u1"]  # u1 is a part of others: see below
    assert all(len(mentions(lake.root, user)) >= 5 for user in wanted)
    context = run(cfg, wanted)
    assert [mentions(lake.root, user) for user in wanted] == [set()] * 3
    assert {name: lake.input_hash(name) for name in ("interactions", "user_stats", "rejected_rows")} == {
        "interactions": "ingest 2",
        "user_stats": "features 2",
        "rejected_rows": "ingest 2",
    }
    assert lake.lineage("user_stats", 1) == {"interactions": 1}  # the log of earlier versions can be read
    assert sorted(lake.read("interactions")["user_id"].to_pylist()) == sorted(["u1", *OTHERS])
    for name in ("interactions", "user_stats"):  # what was written can be filtered
        left = pa.Table.from_batches(lake.batches(name, None, None, pc.field("user_id") == "u10"))
        assert left.num_rows == 1
    assert lake.read("user_stats").num_rows == 5 and lake.read("rejected_rows").num_rows == 7
    assert context.facts["interactions"] == "3 rows deleted, 2 files removed"
    assert "interactions: only version 4 can be read now" in capsys.readouterr().err
    versions = {name: lake.version(name) for name in ("interactions", "user_stats", "rejected_rows")}
    again = run(cfg, wanted)
    assert (again.status, again.facts["users"]) == ("up to date", "0 of 3 were there")
    assert versions == {name: lake.version(name) for name in versions}


def test_an_id_that_is_a_part_of_another_takes_only_its_own_rows(make_config):
    cfg = make_config()
    with stage(cfg, "fill") as context:
        fill(context.lake)
    run(cfg, ["u1"])
    lake = context.lake
    left = {value for name in ("interactions", "user_stats") for value in lake.read(name)["user_id"].to_pylist()}
    assert left == {*USERS, *OTHERS} - {"u1"}
    rows = [json.loads(row) for row in lake.read("rejected_rows")["row"].to_pylist()]
    assert {row.get("user_id") for row in rows} == {*left, None}
    assert [row["line"] for row in rows if "line" in row] == ["{'reviewerID': 'u10', broken"]
    assert {"item_id": "u1"} in rows and lake.read("items")["item_id"].to_pylist() == ["u1"]  # no user, an item


def test_a_removal_that_was_interrupted_is_completed(make_config, monkeypatch):
    cfg, user = make_config(), USERS[0]
    with stage(cfg, "fill") as context:
        fill(context.lake)
    lake = context.lake
    for name in ("interactions", "user_stats"):  # as a run that was killed before it removed old files
        DeltaTable(lake.path(name)).delete("user_id = 'Zoë O''Hara'", commit_properties=properties("x"))
    assert mentions(lake.root, user)
    run(cfg, [user])
    assert not mentions(lake.root, user)


def test_messages_that_name_a_user_go_and_a_user_who_is_nowhere_is_said(make_config, capsys):
    cfg = make_config()
    with pytest.raises(InputError), stage(cfg, "features") as failed:
        raise InputError("user 'u1' has 99 events")
    (cfg.run_dir / "error.log").write_text("trace of user 'u1'")
    context = run(cfg, ["u1", "u10"])
    assert not (cfg.run_dir / "error.log").exists()
    assert "u1" not in context.client.get_run(failed.run_id).data.tags["error"]
    said = capsys.readouterr().err
    assert "user 'u10' is in no table" in said and "user 'u1' is in no table" in said


def test_a_removal_without_mlflow_is_not_done(make_config):
    away = make_config(tracking={"uri": "http://127.0.0.1:11", "timeout": 0.5})
    with stage(away, "fill") as context:
        fill(context.lake)
    with pytest.raises(TransientError, match="MLflow does not answer, so its error messages may still name a user"):
        run(away, ["u1"])
    assert "u1" not in context.lake.read("interactions")["user_id"].to_pylist()


def test_the_job_takes_ids_and_files_and_says_counts(tmp_path, make_config):
    cfg = make_config()
    with stage(cfg, "fill") as context:
        fill(context.lake)
    path, listed = tmp_path / "t.yaml", tmp_path / "ids.txt"
    path.write_text(yaml.safe_dump({"name": "t", "runs_dir": str(cfg.runs_dir)}))
    listed.write_text("\n".join(USERS[1:]) + "\n", encoding="utf-8")

    def job(*arguments):
        command = [sys.executable, "jobs/maintain.py", "--config", path, *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    done = job("--forget-users", listed)
    assert done.returncode == 0 and "user_stats: 3 rows deleted, " in done.stderr, done.stderr
    done = job("--forget-user", USERS[0], "--forget-user", "nobody")
    assert done.returncode == 0 and "user 'nobody' is in no table" in done.stderr, done.stderr
    assert set(context.lake.read("interactions")["user_id"].to_pylist()) == set(OTHERS)
    assert job("--forget-user", "").returncode == 3 and job("--forget-users", tmp_path / "none").returncode == 3
    assert job("--forget-user", "a", "--migrate").returncode == 2
