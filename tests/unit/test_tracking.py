"""Test MLflow faults: deleted experiments, runs and models, a store that goes away. On a real SQLite store."""

import json
import shutil

import pytest
from mlflow.tracking import MlflowClient

from adasid import config
from adasid.errors import BusyError, GateError, InputError
from adasid.tokenizers import artifact
from pipelines import cli
from pipelines.engines import tracking
from pipelines.run import Run
from pipelines.training import launch
from pipelines.training.register import register


@pytest.fixture
def cfg(make_config):
    return make_config()


def client_of(cfg):
    return MlflowClient(Run(cfg).tracking_uri)


def message(cfg, name="a stage", error=InputError):
    with pytest.raises(error) as found, tracking.stage(cfg, name):
        pass
    assert len(str(found.value).splitlines()) == 1
    return str(found.value)


def test_a_deleted_experiment_is_named_with_the_fix(cfg):
    client = client_of(cfg)
    number = client.create_experiment("adasid")
    client.delete_experiment(number)
    text = message(cfg)
    assert (
        text.startswith("experiment 'adasid' was deleted in MLflow (sqlite:///")
        and "or set tracking.experiment" in text
    )
    assert f"mlflow experiments restore --experiment-id {number}" in text
    client.restore_experiment(number)
    with tracking.stage(cfg, "a stage") as context:
        context.metrics({"a": 1.0})
    assert client.get_run(context.run_id).data.tags["status"] == "done"


def test_another_experiment_gets_a_parent_of_its_own(cfg):
    with tracking.stage(cfg, "one") as first:
        pass
    other = cfg.model_copy(update={"tracking": config.Tracking(experiment="other")})
    with tracking.stage(other, "two") as second:
        pass
    client = client_of(cfg)
    parents = [client.get_run(client.get_run(t.run_id).data.tags["mlflow.parentRunId"]) for t in (first, second)]
    assert parents[0].info.experiment_id != parents[1].info.experiment_id
    client.delete_run(parents[1].info.run_id)
    with tracking.stage(other, "three") as third:
        pass
    assert client.get_run(third.run_id).data.tags["mlflow.parentRunId"] != parents[1].info.run_id


@pytest.mark.parametrize("error", [GateError("a gate"), BusyError("busy"), InputError("input"), ValueError("a bug")])
def test_a_store_that_goes_away_does_not_replace_the_error(cfg, error, capsys):
    with pytest.raises(type(error), match=str(error)), tracking.stage(cfg, "a stage"):
        (cfg.run_dir / "mlflow.db").write_text("not a database")
        raise error
    assert "fails (" in capsys.readouterr().err


def test_exit_codes_survive_a_store_that_goes_away(cfg, tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps({"name": cfg.name, "runs_dir": cfg.runs_dir}))
    parsed = cli.parser("").parse_args(["--config", str(path)])

    def refuse(cfg, context):
        shutil.rmtree(cfg.run_dir / "artifacts", ignore_errors=True)
        (cfg.run_dir / "mlflow.db").write_text("not a database")
        raise GateError("churn is 0.5, allowed 0.1")

    assert cli.run(parsed, cli.stage("retokenize", refuse)) == 4
    assert capsys.readouterr().err.splitlines()[-1].endswith("Z ERROR t/retokenize: churn is 0.5, allowed 0.1")


def test_a_stage_that_is_done_stays_done_without_the_store(cfg, capsys):
    with tracking.stage(cfg, "a stage") as context:
        (cfg.run_dir / "mlflow.db").write_text("not a database")
        context.facts["items"] = 3
    assert f"records go to {Run(cfg).spool}" in capsys.readouterr().err
    assert json.loads((cfg.run_dir / "stages.jsonl").read_text())["facts"] == {"items": 3}


def test_a_run_that_is_deleted_meanwhile_is_named_and_the_stage_goes_on(cfg, capsys):
    with tracking.stage(cfg, "a stage") as context:
        context.client.delete_run(context.run_id)
        for epoch in range(3):
            context.metrics({"a": 1.0}, epoch)
    said = capsys.readouterr().err
    assert said.count("MLflow has not taken a record of this stage (batch: ") == 1
    assert not Run(cfg).spool.exists() and "done in" in said


def test_a_store_that_cannot_be_used_is_named_without_its_password(cfg, capsys):
    away = cfg.model_copy(update={"tracking": config.Tracking(uri="http://user:secret@127.0.0.1:9")})
    with tracking.stage(away, "a stage"):
        pass
    (line,) = [line for line in capsys.readouterr().err.splitlines() if " WARN " in line]
    assert "t/a stage: MLflow at http://127.0.0.1:9 fails (" in line and "refused" in line
    assert "secret" not in line
    wrong = cfg.model_copy(update={"tracking": config.Tracking(uri="gopher://user:secret@127.0.0.1")})
    text = message(wrong)
    assert text.startswith("tracking.uri gopher://127.0.0.1: ") and "correct tracking.uri" in text


@pytest.mark.parametrize(
    "name", ["a/b", "../x", "compare \"q\" 's'", "100 %", "🛒", "x" * 2000, "a: b, (10, 9)", "<b>"]
)
def test_stages_may_be_called_by_any_label(cfg, name):
    with tracking.stage(cfg, name) as context:
        pass
    assert client_of(cfg).get_run(context.run_id).info.run_name == name[:250]


def test_keys_that_mlflow_does_not_take_are_no_obstacle(cfg):
    odd = cfg.model_copy(update={"spark": config.Config().spark.model_copy(update={"conf": {"spark.x(y)=é": "1"}})})
    with tracking.stage(odd, "a stage"):
        pass


def test_a_registered_model_that_was_deleted_is_made_again(cfg, tmp_path, capsys):
    settings, folder, client = config.RandomSidSettings(), tmp_path / "model", client_of(cfg)
    digest = artifact.write(folder, artifact.build(settings, {}), settings, {}).digest
    for _ in range(2):
        with tracking.stage(cfg, "sids") as context:
            register(cfg, context, folder, digest, "champion")
        assert client.get_model_version_by_alias("adasid-t", "champion").tags["digest"] == digest
        client.delete_registered_model("adasid-t")
    shutil.rmtree(folder)
    with tracking.stage(cfg, "sids") as context:
        register(cfg, context, folder, digest, "champion")
    assert f"tokenizer {digest} is neither in MLflow nor in {folder}: champion stays" in capsys.readouterr().err


def test_no_secret_of_the_config_is_in_the_store_or_a_file(cfg):
    conf = {"spark.hadoop.fs.s3a.secret.key": "planted-s3cr3t", "spark.ui.enabled": "false"}
    secret = cfg.model_copy(update={"spark": cfg.spark.model_copy(update={"conf": conf})})
    with tracking.stage(secret, "a stage") as context:
        sent = launch.payload(secret, context.lake, {}, Run(secret).folder)
    with pytest.raises(InputError), tracking.stage(secret, "another"):
        raise InputError("s3://someone:planted-s3cr3t@bucket: refused")
    assert "planted-s3cr3t" not in sent.model_dump_json()
    files = [path for path in Run(secret).folder.rglob("*") if path.is_file()]
    assert any(path.name == "config.yaml" and "spark.ui.enabled" in path.read_text() for path in files)
    assert [path for path in files if b"planted-s3cr3t" in path.read_bytes()] == []
