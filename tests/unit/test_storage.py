"""Test files in object storage against moto's server: whole or not at all, and faults as one line with the fix."""

import os
import subprocess
import sys

import pytest

from adasid import config, files, storage
from adasid.errors import InputError, TransientError
from adasid.storage import ObjectPath
from adasid.tokenizers import artifact
from adasid.tokenizers.opq import OpqSettings
from pipelines.engines import tracking
from pipelines.engines.lake import Lake
from pipelines.publish.lease import Lease
from tests import s3


def test_a_file_is_read_listed_copied_and_removed(bucket, tmp_path):
    folder = ObjectPath.of(f"{bucket}/a run")
    files.write_json(folder / "x" / "state.json", {"step": 1})
    files.append_line(folder / "lines.jsonl", "1")
    files.append_line(folder / "lines.jsonl", "2")
    assert (folder / "x" / "state.json").exists()
    assert not (folder / "x").exists()
    assert (folder / "x").is_dir()
    assert (folder / "lines.jsonl").read_text() == "1\n2\n"
    assert [path.name for path in folder.glob("*/state.json")] == ["state.json"]
    assert [path.name for path in folder.rglob("*.json")] == ["state.json"]
    with files.local(folder) as copy:
        assert sorted(path.name for path in copy.rglob("*") if path.is_file()) == ["lines.jsonl", "state.json"]
    files.remove(folder)
    assert list(folder.files()) == []
    with pytest.raises(FileNotFoundError, match="does not exist"):
        (folder / "lines.jsonl").read_bytes()


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_a_write_that_fails_publishes_nothing(place, bucket, tmp_path):
    path = (tmp_path if place == "disk" else ObjectPath.of(bucket)) / "half.bin"

    def half() -> None:
        with files.replacing(path) as draft:
            draft.write_bytes(b"half")
            raise KeyError(path)

    for before in (None, b"old"):
        if before:
            files.write_bytes(path, before)
        with pytest.raises(KeyError):
            half()
        assert (path.read_bytes() if path.exists() else None) == before


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ("denied", InputError, "check the credentials"),
        ("read-only", InputError, "read, write, list and delete in s3://lake"),
        ("down", TransientError, "does not answer"),
    ],
)
def test_a_fault_is_one_line_with_bucket_operation_and_fix(fault, error, words, bucket, server, monkeypatch):
    monkeypatch.setattr(storage, "_RETRIES", {"max_retries": 1})
    storage._store.cache_clear()
    s3.ask(server, "/_fault", "PUT", fault.encode())
    try:
        with pytest.raises(error) as caught:
            Lake(f"{bucket}/lake", {}).writable()
    finally:
        s3.ask(server, "/_fault", "PUT")
        storage._store.cache_clear()
    text = str(caught.value)
    assert text.startswith("PUT s3://lake/")
    assert words in text
    assert "\n" not in text
    assert s3.ENVIRONMENT["AWS_SECRET_ACCESS_KEY"] not in text


def test_a_store_that_ignores_conditions_is_refused(bucket, server):
    lake = Lake(f"{bucket}/lake", {})
    lake.writable()
    s3.ask(server, "/_fault", "PUT", b"no conditions")
    try:
        with pytest.raises(InputError, match="ignores If-None-Match, by which Delta commits exclude each other"):
            lake.writable()
    finally:
        s3.ask(server, "/_fault", "PUT")
    assert not [path for path in ObjectPath.of(f"{bucket}/lake").files() if "probe" in path.name]


def test_a_bucket_that_does_not_exist_is_named(server):
    with pytest.raises(InputError, match="s3://absent does not exist: create it"):
        Lake("s3://absent/lake", {}).writable()


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        (
            "Error performing PUT http://169.254.169.254/latest/api/token - status code: 403",
            InputError,
            "no credentials",
        ),
        ("GET http://s/lake/403/x - HTTP error: error sending request", TransientError, "not answer"),
        (
            "Error performing GET http://s/lake/x - status code: 400 AuthorizationHeaderMalformed",
            InputError,
            "AWS_REGION",
        ),
        (
            "Error performing GET http://s/lake/x - status code: 404 Not Found: NoSuchKey",
            InputError,
            "removed or vacuumed",
        ),
        ("GET http://s/lake/x - status code: 429 SlowDown", TransientError, "not answer"),
    ],
)
def test_a_fault_follows_from_what_the_store_says_not_from_names(text, error, words):
    found = storage.translated(OSError(f"Error performing {text}"))
    assert type(found) is error
    assert words in str(found)


def test_a_store_that_is_not_there_is_a_passing_fault():
    code = "from pipelines.engines.lake import Lake; Lake('s3://lake/x', {}).writable()"
    environment = {**os.environ, **s3.environment(9)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "TransientError: PUT s3://lake/x/.probe" in done.stderr.splitlines()[-1]
    assert "does not answer" in done.stderr.splitlines()[-1]


def test_tables_are_listed_without_their_files(bucket):
    lake = Lake(f"{bucket}/tables", {})
    for name in ("items", "trials/one"):
        lake.write_rows(name, s3.SCHEMA, [{"item_id": "a"}], "digest")
    assert lake.tables() == ["items", "trials/one"]
    assert lake.missing("items", 0) == []
    for path in ObjectPath.of(lake.path("items")).rglob("*.parquet"):
        path.unlink()
    assert len(lake.missing("items", 0)) == 1
    lake.restore("items", None)
    assert lake.tables() == ["trials/one"]


def test_a_slow_store_delays_the_lease_but_does_not_lose_it(bucket, server):
    lease = Lease(Lake(f"{bucket}/lake", {}), seconds=20.0)
    s3.ask(server, "/_fault", "PUT", b"slow 0.05")
    try:
        lease.take(wait=0.0)
        assert lease.renew()
        lease.check()
        lease.give_back()
    finally:
        s3.ask(server, "/_fault", "PUT")


def test_a_half_uploaded_artifact_is_none(bucket):
    whole, half = (ObjectPath.of(f"{bucket}/{name}/model") for name in ("whole", "half"))
    settings = OpqSettings(content=["text"], levels=2, codebook_size=4, width=4)
    manifest = artifact.write(whole, artifact.build(settings, {"text": 8, "behavior": 4}), settings, {})
    assert artifact.read(whole)[1].digest == manifest.digest
    weights = (whole / "weights.safetensors").read_bytes()
    (half / "weights.safetensors").write_bytes(weights)
    with pytest.raises(InputError, match=r"no manifest\.json"):
        artifact.read(half)
    (half / "weights.safetensors").write_bytes(weights[:-1])
    files.write_text(half / "manifest.json", manifest.json_text())
    with pytest.raises(InputError, match="the weights are damaged"):
        artifact.read(half)


def test_a_run_in_a_bucket_without_a_server_keeps_its_records_there(bucket):
    cfg = config.build({"name": "t", "runs_dir": bucket})
    with tracking.stage(cfg, "report") as context:
        context.inputs({"items": 3})
        context.metrics({"recall@10": 0.5})
    assert context.lineage(1) == [("items", 3)]
    (path,) = context.recorder.spool.files()
    records = context.recorder.spool.read(path).records
    assert {"create", "params", "batch", "input", "text", "end"} <= {record["do"] for record in records}
    assert str(path).startswith(f"{bucket}/t/mlflow-spool/")
