"""Start or join a Ray cluster, run one function on all training workers, and report its errors as one line."""

from __future__ import annotations

import ctypes
import json
import math
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from adasid import config, errors, storage
from adasid.distributed import settle
from adasid.faults import passing, wrapped
from adasid.files import Location, location, write_json
from adasid.training.loop import PROGRESS
from pipelines import log
from pipelines.engines import code

MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "2147483648",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}
"""With these settings glibc retains large buffers instead of returning them to the kernel every step (1.4 times faster
training on CPUs)."""

METRICS = "metrics.jsonl"
_FAILURE = "failure.json"
_NOTED = 60.0
"""Progress within an epoch is printed at intervals of so many seconds."""
_POLL = 5.0
"""Metrics in object storage are read at intervals of so many seconds."""
_CAUSED = "The above exception was the direct cause of the following exception:"
_RAYS = re.compile(r"^(ray\.\S+|UserExceptionWithTraceback|UserCodeException)\b", re.MULTILINE)
_SHARED = "shared.json"
"""The driver writes this file, for every worker to see that it shares the folder."""
_JOINING = threading.Lock()
_OTHERS = threading.excepthook
"""This hook prints the errors of all other threads."""
_LISTENER = "ray_listen_error_messages"
"""Name of the thread with which Ray prints errors of the cluster."""

P = TypeVar("P")


def release_unused() -> None:
    """Return to the kernel what glibc and Arrow retain without use, as after a table was read: arrays that are larger
    than what is free between others would be placed above it. Does nothing with another C library."""
    pa.default_memory_pool().release_unused()
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def fit(
    function: Callable[[P], None],
    payload: P,
    settings: config.Ray,
    name: str,
    folder: Location,
    show: Callable[[dict[str, float]], None],
    note: Callable[[str], None],
) -> None:
    """Run ``function(payload)`` on ``settings.workers`` Ray Train workers with a torch process group, or in this
    process for 0.

    A worker that dies is replaced (the function resumes from its checkpoint in ``folder``). ``show`` gets each new row
    of the ``metrics.jsonl`` that the function writes in ``folder``, ``note`` a line of how far it is within an epoch or
    a test, at most one a minute. Raises the workers' own AdasidError, or TrainingError.
    """
    (folder / _FAILURE).unlink(missing_ok=True)
    (folder / PROGRESS).unlink(missing_ok=True)
    write_json(folder / _SHARED, {"host": socket.gethostname()})
    with _watch(folder, show, note):
        if settings.workers == 0:
            settle(threads(settings))
            function(payload)
        else:
            _fit_on_ray(function, payload, settings, name, folder)


def _fit_on_ray(function: Callable[[P], None], payload: P, settings: config.Ray, name: str, folder: Location) -> None:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    join(settings)
    available, gpus = ray.cluster_resources(), gpus_of(settings)
    workers = min(settings.workers, gpus) if gpus else settings.workers
    if workers < settings.workers:
        log.line(f"{workers} workers instead of {settings.workers}, one for each GPU", "WARN")
    if available.get("CPU", 0) < workers * settings.cpus_per_worker:
        need = workers * settings.cpus_per_worker
        log.line(
            f"waiting for {need:g} CPUs, the Ray cluster has {available.get('CPU', 0):g}; lower ray.workers or "
            "ray.cpus_per_worker",
            "WARN",
        )
    resources = {"CPU": settings.cpus_per_worker, **({"GPU": 1} if gpus else {})}
    scaling = ScalingConfig(num_workers=workers, use_gpu=bool(gpus), resources_per_worker=resources)
    run = RunConfig(
        name=name, storage_path=str(folder / "ray"), failure_config=FailureConfig(max_failures=settings.max_failures)
    )
    call = {"function": function, "payload": payload, "folder": str(folder), "threads": threads(settings)}
    trainer = TorchTrainer(_guarded, train_loop_config=call, scaling_config=scaling, run_config=run)
    try:
        trainer.fit()
    except Exception as error:
        _raise_failure(folder)
        if lost := re.search(r"adasid\.errors\.InputError: ([^\n]+ of the driver is not there on [^\n]+)", str(error)):
            raise errors.InputError(lost.group(1)) from error
        raise failed(f"{name}: the workers failed", "to resume from the last checkpoint", error) from error
    _raise_failure(folder, ("TrainingError",))  # a retry has recovered from any other kind


def gpus_of(settings: config.Ray) -> int:
    """Return the number of the joined cluster's GPUs that may be used."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0)) if settings.gpus == "auto" else 0


def failed(problem: str, effect: str, error: Exception) -> errors.AdasidError:
    """Return the error to raise where Ray's workers have failed; ``effect``: that of running the command again."""
    kind = errors.TransientError if passing(error) else errors.TrainingError
    return kind(f"{problem} ({_last_line(error)}); run the command again {effect}")


def rows(folder: Location) -> list[dict[str, float]]:
    """Return the metrics that the function has written so far, one row an epoch."""
    try:
        text = (folder / METRICS).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines()]


def _progress(folder: Location) -> str:
    """Return what the training's rank 0 said last of how far it is; empty where it said nothing, or cannot be read."""
    try:
        found = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
    except (OSError, errors.TransientError):
        return ""
    return f"{found['what']}: {found['done'] / found['of']:.0%}"


@contextmanager
def _watch(folder: Location, show: Callable[[dict[str, float]], None], note: Callable[[str], None]) -> Iterator[None]:
    """Call ``show`` with each new row of metrics and ``note`` with the progress (also where another machine writes
    them); raise an error of theirs at the end."""
    stop = threading.Event()
    failed: list[Exception] = []

    def follow(seen: int) -> None:
        last, before, noted = False, "", time.monotonic()
        while not last:
            last = stop.wait(1.0 if isinstance(folder, Path) else _POLL)
            logged = rows(folder)
            if len(logged) > seen:
                before = _progress(folder)  # of an epoch that has ended
            for row in logged[min(seen, len(logged)) :]:
                show(row)
            seen = len(logged)
            if not last and time.monotonic() - noted >= _NOTED:
                noted, text = time.monotonic(), _progress(folder)
                if text != before:
                    note(text)
                before = text

    def guarded(seen: int) -> None:
        try:
            follow(seen)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=guarded, args=(len(rows(folder)),), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if failed:
        raise failed[0]


def shutdown() -> None:
    """Stop the local cluster that :func:`fit` started, or disconnect from the one it joined."""
    import ray

    if ray.is_initialized():
        ray.shutdown()


def join(settings: config.Ray) -> None:
    """Connect to the cluster, or start a local one, unless this process has done so. Raises InputError where the
    cluster refuses or does not answer."""
    import ray
    from ray.exceptions import AuthenticationError

    try:
        with _JOINING:
            if not ray.is_initialized():
                _connect(settings)
    except AuthenticationError as error:
        raise errors.InputError(
            f"Ray refused the connection ({errors.first_line(error)}): export RAY_AUTH_MODE=token, and bring the token "
            "of the cluster (~/.ray/auth_token, or the file of RAY_AUTH_TOKEN_PATH)"
        ) from error
    except OSError as error:  # ConnectionError, and a time-out
        where = settings.address or os.environ.get("RAY_ADDRESS")
        raise wrapped(
            error,
            f"no Ray cluster at {where} ({_last_line(error)}): start one with `ray start --head`, or leave "
            "ray.address null",
        ) from error


def _connect(settings: config.Ray) -> None:
    import ray

    threading.excepthook = _one_line_of_listener
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    environment = {**MALLOC, "RAY_TRAIN_V2_ENABLED": "1"}
    address = settings.address or os.environ.get("RAY_ADDRESS")
    if address and address.startswith("http"):  # the address of the jobs API, which a driver cannot join
        address = "auto"
    runtime: dict[str, Any] = {"env_vars": {**storage.environment(), **environment}}
    if address and "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:  # a submitted job sends its working_dir
        runtime["py_modules"] = [str(package) for package in code.PACKAGES]
    options: dict[str, Any] = {
        "runtime_env": runtime,
        "log_to_driver": False,
        "logging_level": "ERROR",
    }
    if address:
        host, _, port = address.rpartition(":")
        if host and port.isdigit():  # Ray itself would retry silently for five minutes
            socket.create_connection((host.removeprefix("ray://"), int(port)), timeout=10).close()
        ray.init(address=address, **options)
    else:
        cpus = max(os.cpu_count() or 1, math.ceil(settings.workers * settings.cpus_per_worker))
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **options)


def _one_line_of_listener(found: threading.ExceptHookArgs) -> None:
    """Print a line, not a trace, where Ray's thread ends that prints errors of the cluster: a poll of its can fail
    (Ray's issue 40575), and no result depends on it. Other threads' errors go to the hook that was there."""
    if found.thread is None or found.thread.name != _LISTENER or found.exc_value is None:
        _OTHERS(found)
    else:
        log.line(f"Ray's messages are not shown from here on ({_last_line(found.exc_value)})", "WARN")


def _guarded(call: dict[str, Any]) -> None:
    """Run the function on a worker; write an expected error to the file that the driver reads."""
    settle(call["threads"])
    folder = location(call["folder"])
    if not (folder / _SHARED).exists():
        raise errors.InputError(
            f"{folder} of the driver is not there on {socket.gethostname()}: mount one folder on all machines, or name "
            "a bucket in runs_dir (s3://bucket/prefix)"
        )
    try:
        call["function"](call["payload"])
    except errors.AdasidError as error:
        write_json(folder / _FAILURE, {"kind": type(error).__name__, "message": str(error)})
        if not isinstance(
            error, errors.TrainingError
        ):  # all workers raise a TrainingError together: a retry would fail again, and no worker waits
            raise


def _raise_failure(
    folder: Location, kinds: tuple[str, ...] = ("TrainingError", "InputError", "ConfigError", "TransientError")
) -> None:
    path = folder / _FAILURE
    if path.exists():
        failure = json.loads(path.read_text(encoding="utf-8"))
        if failure["kind"] in kinds:
            raise getattr(errors, failure["kind"])(failure["message"])


def threads(settings: config.Ray) -> int:
    """Return the number of torch's threads in a worker."""
    return max(1, round(settings.cpus_per_worker))


def _last_line(error: BaseException) -> str:
    """Return the last line of an error, without the traces of Ray's own wrappers around it."""
    causes = str(error).split(_CAUSED)
    while len(causes) > 1 and _RAYS.search(causes[-1]):
        causes.pop()
    lines = [line.strip() for line in causes[-1].splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
