"""Check what a job needs before it runs (``--check``). Nothing is run and nothing is written."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import shutil
import socket
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from adasid.config import Config
from adasid.config.secrets import masked_text
from adasid.errors import AdasidError, InputError, TransientError, first_line
from adasid.faults import passing, wrapped
from pipelines import log
from pipelines.run import Run

_ENGINES = {
    "ingest": ("spark",),
    "encode_content": ("spark", "ray"),
    "build_features": ("spark",),
    "write_sids": ("spark",),
    "retokenize": ("spark", "ray"),
    "train": ("ray", "spark"),
    "compare_tokenizers": ("spark", "ray"),
    "evaluate": ("spark", "ray"),
    "run_all": ("spark", "ray"),
}
"""Job -> engines that it may start."""

_MODULES = {"spark": ("pyspark", "delta", "pandas"), "ray": ("torch", "ray")}
_LIBRARIES = ("adasid", "pyspark", "delta-spark", "deltalake", "pyarrow", "ray", "torch", "numpy", "mlflow")
_JAVA = 17


def run(cfg: Config, job: str) -> int:
    """Print one line for each check of a job; return 0, or the exit code of the first fault."""
    log.place(cfg.name, job)
    log.line("config ok")
    code = 0
    for name, check in _checks(cfg, job):
        try:
            log.line(f"{name} ok: {check()}")
        except Exception as error:
            text = str(error) if isinstance(error, AdasidError) else f"{type(error).__name__}: {first_line(error)}"
            log.line(f"{name}: {text}", "ERROR")
            code = code or _code(error)
    return code


def _code(error: Exception) -> int:
    if isinstance(error, AdasidError):
        return error.exit_code
    return TransientError.exit_code if passing(error) else 1


def _checks(cfg: Config, job: str) -> Iterator[tuple[str, Callable[[], str]]]:
    engines = _ENGINES.get(job, ())
    yield "versions", _versions
    for engine in engines:
        yield engine, partial(_importable, engine)
    if "spark" in engines:
        yield "java", _java
        yield "jars", partial(_jars, cfg)
    if job in {"ingest", "run_all"}:
        yield "source", partial(_source, cfg)
    yield "storage", partial(_storage, cfg)
    yield "lake", partial(_lake, cfg)
    yield "mlflow", partial(_mlflow, cfg)
    if "ray" in engines and cfg.ray.workers and (cfg.ray.address or os.environ.get("RAY_ADDRESS")):
        yield "ray address", partial(_address, cfg)


def _versions() -> str:
    found = {name: importlib.metadata.version(name) for name in _LIBRARIES if _installed(name)}
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _installed(name: str) -> bool:
    return any(importlib.metadata.distributions(name=name))


def _importable(engine: str) -> str:
    try:
        for module in _MODULES[engine]:
            importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{first_line(error)}; run `make setup`") from error
    return ", ".join(_MODULES[engine])


def _java() -> str:
    home = os.environ.get("JAVA_HOME")
    java = str(Path(home) / "bin" / "java") if home else shutil.which("java")
    fix = f"install Java {_JAVA} or newer and put it on PATH or JAVA_HOME: run `make setup`"
    if java is None or not Path(java).exists():
        raise InputError(f"{java or 'java'} does not exist; {fix}")
    shown = subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr
    version = re.search(r'version "(\d+)', shown)
    if version is None or int(version[1]) < _JAVA:
        raise InputError(f"{java} says {' '.join(shown.split())[:100]!r}; {fix}")
    return f"{java}, version {version[1]}"


def _jars(cfg: Config) -> str:
    from pipelines.engines.spark import JARS, LOG_STORE_JAR, S3_JAR, jar_folder

    paths = [str(cfg.runs_dir), *_texts(cfg.source.model_dump(mode="json"))]
    on_s3 = any(re.match(r"s3[an]?://", path) for path in paths)
    needed = (*JARS, LOG_STORE_JAR, *((S3_JAR,) if on_s3 else ()))
    if missing := [jar for jar in needed if not (jar_folder() / jar).exists()]:
        raise InputError(
            f"{jar_folder()} has no {missing[0]}; run `python -m pipelines.engines.jars --s3`, or `make setup`"
        )
    return ", ".join(needed)


def _texts(section: Any) -> Iterator[str]:
    """Yield all texts of a section of the config."""
    for value in section.values() if isinstance(section, dict) else section if isinstance(section, list) else ():
        yield from [value] if isinstance(value, str) else _texts(value)


def _source(cfg: Config) -> str:
    from pipelines.sources import check

    return "; ".join(check.check(cfg, lambda text: log.line(text, "WARN")))


def _storage(cfg: Config) -> str:
    folder = Run(cfg).folder
    if not isinstance(folder, Path):
        folder.is_dir()
        return f"{folder} can be listed (only a write shows whether it may be written)"
    there = next(path for path in (folder, *folder.parents) if path.exists())
    fix = "choose another folder with --set runs_dir=PATH, or mend it"
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK) or os.statvfs(there).f_flag & os.ST_RDONLY:
        raise InputError(f"{there} is not writable; {fix}")
    free = shutil.disk_usage(there).free
    if not free:
        raise TransientError(f"{there} has no space left: free the disk")
    return f"{folder} is writable, {free / 2**30:.1f} GiB are free"


def _lake(cfg: Config) -> str:
    from pipelines import migrate

    lake = Run(cfg).lake
    version = migrate.current(lake)
    if version is None:
        return "no table yet"
    migrate.check(lake)
    return f"{lake.root} has format {version}"


def _mlflow(cfg: Config) -> str:
    from pipelines.engines import recorder, tracking
    from pipelines.engines.spool import Spool

    run = Run(cfg)
    waiting = len(Spool(run.spool, cfg.tracking.experiment).files())
    spool = f"; {waiting} files wait in {run.spool}" if waiting else ""
    if cfg.tracking.uri is None:
        return f"{_local_store(cfg)}{spool}"
    try:
        tracking.reach(cfg)
    except AdasidError:
        raise
    except Exception as error:
        fix = "start the server, or correct tracking.uri"
        text = f"{run.tracking_uri} does not answer ({recorder.reason(error)}); {fix}"
        raise wrapped(error, masked_text(text)) from error
    return masked_text(f"{run.tracking_uri}{spool}")


def _local_store(cfg: Config) -> str:
    """Return the path of the SQLite store; MLflow itself would write into it."""
    folder = Run(cfg).folder
    if not isinstance(folder, Path):
        return "none: tracking.uri is null, records wait for a server"
    path = folder / "mlflow.db"
    if not path.exists():
        return f"{path} does not exist yet"
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as store:
            store.execute("select count(*) from runs").fetchone()
    except sqlite3.Error as error:
        raise InputError(f"{path}: {error}; remove it to start with an empty store") from error
    return str(path)


def _address(cfg: Config) -> str:
    address = cfg.ray.address or os.environ["RAY_ADDRESS"]
    parsed = urlparse(address if "://" in address else f"ray://{address}")
    if parsed.hostname is None or parsed.port is None:
        return f"{address} is looked up when training starts"
    try:
        socket.create_connection((parsed.hostname, parsed.port), timeout=5).close()
    except OSError as error:
        fix = "start one with `ray start --head`, or leave ray.address null"
        raise wrapped(error, f"no Ray cluster at {address} ({error}): {fix}") from error
    return address
