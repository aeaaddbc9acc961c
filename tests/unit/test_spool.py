"""Test a tracking server that refuses, hangs, goes away and comes back: a real MLflow server, and real sockets."""

import json
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import ExitStack, suppress
from pathlib import Path

import pyarrow as pa
import pytest
from mlflow.tracking import MlflowClient

from adasid import config
from adasid.errors import GateError
from adasid.tokenizers import artifact
from pipelines import cli
from pipelines.engines import recorder, spool, tracking
from pipelines.nightly import upkeep
from pipelines.run import Run
from pipelines.training.register import register

ROWS = pa.schema([("item_id", pa.string())])


class Door:
    """A port that leads to a server while it is open, and refuses while it is not."""

    def __init__(self, goal):
        self.goal, self.listener, self.open_sockets = goal, None, []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    def __enter__(self):
        self.listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self.listener,), daemon=True).start()
        return MlflowClient(f"http://127.0.0.1:{self.goal}")

    def __exit__(self, *error):
        self.listener.shutdown(socket.SHUT_RDWR)
        for end in (self.listener, *self.open_sockets):
            end.close()
        self.open_sockets = []

    def _accept(self, listener):
        with suppress(OSError):
            while True:
                ends = listener.accept()[0], socket.create_connection(("127.0.0.1", self.goal))
                self.open_sockets += ends
                for source, target in (ends, ends[::-1]):
                    threading.Thread(target=_forward, args=(source, target), daemon=True).start()


def _forward(source, target):
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The port of an MLflow server."""
    folder, port = tmp_path_factory.mktemp("server"), Door(0).port
    store = ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", f"{folder}/artifacts"]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen([*command, *store], stdout=log, stderr=log, cwd=folder)
    try:
        deadline = time.monotonic() + 120
        while not _healthy(port):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "server.log").read_text()[-3000:]
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait()


def _healthy(port):
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    except OSError:
        return False


@pytest.fixture
def door(server):
    return Door(server)


@pytest.fixture(autouse=True)
def no_rest(monkeypatch):
    """The server is called again by the next stage, however the last call ended."""
    monkeypatch.setattr(recorder, "_REST", 0)


@pytest.fixture
def away(make_config):
    """A config whose server's port refuses."""

    def make(port, **sections):
        tracked = {"uri": f"http://127.0.0.1:{port}", "timeout": 20.0, **sections}
        return make_config(tracking=tracked)

    return make


@pytest.fixture
def hanging():
    """The port of a server that accepts and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield listener.getsockname()[1]


def warnings(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if " WARN " in line]


def job(cfg, tmp_path, function):
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(cfg.model_dump(mode="json", include={"name", "runs_dir", "tracking"})))
    return cli.run(cli.parser("").parse_args(["--config", str(path)]), cli.stage("retokenize", function))


def test_a_hanging_server_delays_a_refusal_by_one_time_out_and_leaves_its_exit_code(away, hanging, tmp_path, capsys):
    cfg = away(hanging, timeout=0.5)
    capsys.readouterr()

    def refuse(cfg, context):
        for epoch in range(50):
            context.metrics({"loss": 1.0}, epoch)
        raise GateError("churn is 0.5, allowed 0.1")

    started = time.monotonic()
    assert job(cfg, tmp_path, refuse) == 4
    assert time.monotonic() - started < 10
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[1].endswith("ERROR t/retokenize: churn is 0.5, allowed 0.1")
    assert f"fails (no answer within 0.5 s): records go to {Run(cfg).spool}, and the next stage" in lines[0]
    kept = [json.loads(line) for path in Run(cfg).spool.glob("*.jsonl") for line in path.read_text().splitlines()]
    assert len([row for row in kept if row.get("metrics")]) == 50
    assert {"do": "end", "status": "FAILED"}.items() <= kept[-1].items()


def test_what_was_kept_is_sent_by_the_next_stage_that_reaches_the_server(away, door, tmp_path, capsys):
    settings, model = config.RandomSidSettings(), tmp_path / "model"
    cfg = away(door.port, experiment="kept")
    digest = artifact.write(model, artifact.build(settings, {}), settings, {}).digest
    with pytest.raises(GateError), tracking.stage(cfg, "first") as first:
        first.inputs({"items": 3})
        first.outputs({"sids": 5})
        first.document("gates.json", {"gates": [1]})
        raise GateError("a gate")
    with tracking.stage(cfg, "second") as second:
        second.metrics({"recall@10": 0.5}, 7)
        second.artifact(model)
        register(cfg, second, model, digest, "champion")
    assert len(warnings(capsys)) == 1  # one process names the server once
    assert first.lineage(30) is None and second.run_id == second.key
    with door as client:
        before = tmp_path / "before"
        shutil.copytree(Run(cfg).spool, before)
        with tracking.stage(cfg, "third") as third:
            pass
        assert not list(Run(cfg).spool.glob("*.jsonl"))
        assert sorted(third.lineage(30)) == [("items", 3), ("sids", 5)]
        found = {
            run.info.run_name: run for run in client.search_runs([client.get_experiment_by_name("kept").experiment_id])
        }
        assert set(found) == {"t", "first", "second", "third"} and found["third"].info.run_id == third.run_id
        parent = found["t"]
        assert parent.data.params["seed"] == "17" and parent.info.status == "FINISHED"
        for name in ("first", "second", "third"):
            assert found[name].data.tags["mlflow.parentRunId"] == parent.info.run_id
        one, two = found["first"], found["second"]
        assert one.info.status == "FAILED" and one.data.tags["error"] == "a gate"
        assert one.data.tags["in.items"] == "3" and one.inputs.dataset_inputs[0].dataset.name == "items"
        assert two.info.status == "FINISHED" and two.data.metrics["recall_at_10"] == 0.5
        assert one.info.start_time <= one.info.end_time <= two.info.start_time < found["third"].info.start_time
        assert {file.path for file in client.list_artifacts(one.info.run_id)} == {"config.yaml", "gates.json"}
        assert "model/manifest.json" in {file.path for file in client.list_artifacts(two.info.run_id, "model")}
        assert client.get_model_version_by_alias("adasid-t", "champion").tags["digest"] == digest

        for path in before.iterdir():  # a stage that was killed sends the same file again
            shutil.copy(path, Run(cfg).spool)
        with tracking.stage(cfg, "fourth"):
            pass
        again = client.search_runs([client.get_experiment_by_name("kept").experiment_id])
        assert sorted(run.info.run_name for run in again) == ["first", "fourth", "second", "t", "third"]
        assert len(client.get_metric_history(two.info.run_id, "recall_at_10")) == 1


def test_a_server_that_goes_away_within_a_stage_gets_the_rest_later(away, door, capsys):
    cfg = away(door.port, experiment="within")
    with ExitStack() as stack:
        with door:
            first = stack.enter_context(tracking.stage(cfg, "first"))
            run_id = first.run_id
        first.metrics({"loss": 1.0}, 2)
    assert len(warnings(capsys)) == 1 and run_id != first.key
    with door as client:
        with tracking.stage(cfg, "second"):
            pass
        run = client.get_run(run_id)
        assert run.info.status == "FINISHED" and run.data.metrics["loss"] == 1.0
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if " MLflow: 1 files of " in line] == said[:1] and " WARN " not in "".join(said)


def test_maintenance_removes_no_file_while_the_lineage_is_unknown(away, make_config, hanging, capsys):
    gates = {"grace_hours": 0, "lineage_days": 30}
    cfg = away(hanging, timeout=0.3).model_copy(update={"retokenize": config.Retokenize(**gates)})
    lake = tracking.open_lake(cfg)
    for digest in ("one", "two"):
        lake.write_rows("items", ROWS, [{"item_id": digest}], digest)
    files = set(Path(lake.path("items")).glob("*.parquet"))
    with tracking.stage(cfg, "maintain", migrates=True) as context:
        upkeep.maintain(cfg, context)
    assert set(Path(lake.path("items")).glob("*.parquet")) == files and len(files) == 2
    assert "t/maintain: MLflow does not answer: what recent runs read is unknown, so no file is removed" in "".join(
        warnings(capsys)
    )
    local = cfg.model_copy(update={"tracking": config.Tracking()})
    with tracking.stage(local, "maintain") as context:  # sends what was kept
        upkeep.maintain(local, context)
    assert len(set(Path(lake.path("items")).glob("*.parquet"))) == 1
    assert not warnings(capsys)


def test_a_full_spool_is_named_and_its_lineage_counts_as_unknown(away, monkeypatch, capsys):
    cfg, local = away(Door(0).port), away(Door(0).port).model_copy(update={"tracking": config.Tracking()})
    monkeypatch.setattr(spool, "_FILES", 1)
    for name in ("first", "second"):
        with tracking.stage(cfg, name):
            pass
    assert len(list(Run(cfg).spool.glob("*.jsonl"))) == 1
    assert any("is full: create is lost" in line for line in warnings(capsys))
    with tracking.stage(local, "third") as third:
        assert not third.recorder.spool.files()
        assert third.lineage(1) is None and third.lineage(0) == []


def test_what_mlflow_refuses_or_nobody_can_read_does_not_block_the_spool(make_config, capsys):
    cfg = make_config()
    folder = Run(cfg).spool
    folder.mkdir()
    head = json.dumps({"experiment": "adasid", "tries": 0})
    batch = {"do": "batch", "run": "0" * 32, "metrics": {"a": 1.0}, "tags": {}, "step": 0, "time": 1}
    (folder / "1.jsonl").write_text(f"{head}\n{json.dumps(batch)}\n{json.dumps({'do': 'nothing'})}\n")
    (folder / "2.jsonl").write_text("{")
    with tracking.stage(cfg, "a stage") as context:
        pass
    said = warnings(capsys)
    assert any("has not taken a record of this stage (batch: " in line for line in said), said
    assert any("2.jsonl: not readable" in line for line in said)
    assert context.client.get_run(context.run_id).info.status == "FINISHED"
    assert [path.name for path in folder.glob("*.jsonl")] == ["2.jsonl"]
