"""Train through real Ray Train: two workers, a worker that dies, errors that reach the driver. Fits are few, as each
takes half a minute to start."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from adasid import config, errors
from adasid.distributed import Workers
from adasid.training import loop
from pipelines.engines import cluster

SETTINGS = config.Ray(workers=2, cpus_per_worker=0.5, gpus="never", max_failures=1)


@pytest.fixture(scope="module", autouse=True)
def stop_ray():
    yield
    cluster.shutdown()


def collectives(payload):
    """On each worker: killed at the first try of rank 1; then every operation of Workers against its closed form; then
    an error of all."""
    workers, folder = Workers.current(), Path(payload["folder"])
    r = workers.rank
    tries = folder / f"tries-{r}"
    with tries.open("a") as file:
        file.write("x")
    if r == 1 and tries.read_text() == "x":
        os.kill(os.getpid(), signal.SIGKILL)
    checks = {
        "world": workers.world == 2,
        "sum": workers.sum(torch.tensor([1.0, r])).tolist() == [2.0, 1.0],
        "gather": workers.gather(torch.tensor([[r, 5]])).tolist() == [[0, 5], [1, 5]],
        "ragged": workers.gather_ragged(torch.arange(r + 1)).tolist() == [0, 0, 1],
        "exchange": workers.exchange(torch.tensor([r, 5, 6]), [1, 2], [1 + r] * 2).tolist()
        == [[0, 1], [5, 6, 5, 6]][r],
        "broadcast": workers.broadcast(torch.tensor([float(r)])).item() == 0.0,
        "agree": workers.agree(True) and not workers.agree(r == 0),
    }
    own = torch.full((2, 3), float(r + 1), requires_grad=True)
    everyone = workers.gather_with_gradient(own)
    (everyone.sum(dim=0) * (r + 1)).sum().backward()
    checks["gather gradient"] = own.grad.tolist() == [[3.0] * 3] * 2  # d/d(own) of both ranks' losses: weights 1 + 2
    weight, unused = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.tensor([1.0, 3.0]) * (r + 1)
    workers.average_gradients([weight, unused])
    checks["average"] = weight.grad.tolist() == [1.5, 4.5] and unused.grad is None
    dist.barrier()
    (folder / f"result-{r}.json").write_text(json.dumps(checks))
    if r == 0:
        (folder / cluster.METRICS).write_text(json.dumps({"epoch": 1, "loss": 0.5}) + "\n")
    workers.agree(False)
    raise errors.TrainingError("loss is not finite at step 7, input item_features version 3")


def test_collectives_and_a_worker_that_dies_once_and_an_expected_error_that_comes_home_as_one_line(tmp_path):
    shown = []
    with pytest.raises(errors.TrainingError, match=r"^loss is not finite at step 7, input item_features version 3$"):
        cluster.fit(collectives, {"folder": str(tmp_path)}, SETTINGS, "collectives", tmp_path, shown.append, print)
    assert (tmp_path / "tries-1").read_text() == "xx", "killed once, and not tried again after the expected error"
    for rank in range(2):
        checks = json.loads((tmp_path / f"result-{rank}.json").read_text())
        assert all(checks.values()), checks
    assert shown == [{"epoch": 1, "loss": 0.5}]


def test_no_cluster_is_one_line_with_the_fix(tmp_path, monkeypatch):
    cluster.shutdown()
    with pytest.raises(errors.TransientError, match="ray start --head"):
        cluster.fit(
            collectives, {}, SETTINGS.model_copy(update={"address": "127.0.0.1:1"}), "none", tmp_path, print, print
        )


def test_a_listener_of_rays_that_fails_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(cluster, "_OTHERS", threading.__excepthook__)  # not that of pytest
    monkeypatch.setattr(threading, "excepthook", cluster._one_line_of_listener)

    def poll():
        raise RuntimeError("System error: Missing :authority header")

    for name in ("ray_listen_error_messages", "another"):
        thread = threading.Thread(target=poll, name=name)
        thread.start()
        thread.join()
    first, *others = capsys.readouterr().err.splitlines()
    assert "Ray's messages are not shown from here on (System error: Missing :authority header)" in first
    assert others[0] == "Exception in thread another:" and "RuntimeError: System error" in others[-1]


@pytest.mark.parametrize(
    ("outer", "line"),
    [
        ("ray.exceptions.UserCodeException: UDF failed to process a data block.", "KeyError: 'a bug'"),
        ("OSError: cannot load model m", "OSError: cannot load model m"),
    ],
)
def test_the_cause_of_a_failure_is_shown_without_rays_wrapper(outer, line):
    trace = f"ray::f()\n  File x\nKeyError: 'a bug'\n\n{cluster._CAUSED}\n\nray::g()\n  File y\n{outer}\n"
    assert cluster._last_line(RuntimeError(trace)) == line


class Steps(loop.TrainingLoop):
    """A loop of ten steps, of which two take longer than the progress is polled."""

    def epoch(self, number):
        for step in self.tracked(range(10), f"epoch {number}/2"):
            time.sleep(2.5 if step in {4, 7} else 0)
        return {"epoch": float(number)}


def steps(payload):
    model, workers = torch.nn.Linear(1, 1), Workers.current()
    Steps(model, {}, 2, payload["folder"], workers, torch.device("cpu"), "events").run_epochs(loop.silent)


def test_progress_within_an_epoch_is_printed(tmp_path, monkeypatch):
    noted = []
    monkeypatch.setattr(cluster, "_NOTED", 0.0)
    monkeypatch.setattr(loop, "_SECONDS", 0.0)
    settings = SETTINGS.model_copy(update={"workers": 0})
    cluster.fit(steps, {"folder": tmp_path}, settings, "steps", tmp_path, print, noted.append)
    assert set(noted) <= {*(f"epoch {number}/2: {10 * part}%" for number in (1, 2) for part in range(10))}
    assert {"epoch 1/2: 40%", "epoch 1/2: 70%", "epoch 2/2: 40%", "epoch 2/2: 70%"} <= set(noted)


def dies(payload):
    os.kill(os.getpid(), signal.SIGKILL)


def has_a_bug(payload):
    raise KeyError("a bug")


@pytest.mark.parametrize(("function", "code"), [(dies, 75), (has_a_bug, 1)])
def test_workers_that_die_too_often_are_a_fault_that_passes_and_a_bug_is_none(tmp_path, function, code):
    once = SETTINGS.model_copy(update={"max_failures": 0})
    with pytest.raises(errors.AdasidError, match="the workers failed") as found:
        cluster.fit(function, {}, once, "fails", tmp_path, print, print)
    assert found.value.exit_code == code and found.value.__cause__
    assert ("KeyError: 'a bug'" in str(found.value)) == (function is has_a_bug)  # the cause, not a wrapper of Ray's
