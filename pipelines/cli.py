"""Provide what all jobs share: arguments, errors as one line and an exit code, and relative paths that mean what the
user typed."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Sequence
from datetime import date, datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from adasid import config
from adasid.config.secrets import hidden, masked_text
from adasid.errors import AdasidError, TransientError, first_line
from adasid.storage import configure
from pipelines import log, traces

if TYPE_CHECKING:
    from pipelines.engines.tracking import StageContext

EPILOG = (
    "Exit codes: 0 done, 1 failed, 2 bad usage or config, 3 missing or invalid input, 4 gate failed, 5 another "
    "run is at work, 75 a fault that passes: run it again. Every key with its default: conf/base.yaml."
)


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the arguments that every job takes."""
    parsed = argparse.ArgumentParser(
        description=description, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parsed.add_argument(
        "--config", required=True, metavar="FILE", help="YAML file; it names only what differs from the defaults"
    )
    parsed.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override one key, for example --set seed=3 (repeatable)",
    )
    parsed.add_argument(
        "--check",
        action="store_true",
        help="check config, versions, engines, sources, storage, MLflow and Ray, one line each; run and write nothing",
    )
    parsed.set_defaults(job=parsed.prog.removesuffix(".py"))
    return parsed


def day(text: str) -> date:
    """Parse an ISO date, ``today`` or ``yesterday`` (UTC). Raises ArgumentTypeError for any other text, and for
    a date after tomorrow."""
    now = datetime.now(timezone.utc).date()
    named = {"today": now, "yesterday": now - timedelta(days=1)}
    try:
        found = named[text] if text in named else date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a date like 2026-11-22, today or yesterday") from None
    if found > now + timedelta(days=1):
        raise argparse.ArgumentTypeError(
            f"{text} is in the future (today is {now}), and no earlier day could follow it"
        )
    return found


def run(arguments: argparse.Namespace, body: Callable[[config.Config], None]) -> int:
    """Load the config and call ``body``, or the checks of ``--check``; turn errors into one line on standard error.
    Returns the exit code."""
    cfg: config.Config | None = None
    log.place("")
    checks = getattr(arguments, "check", False)
    try:
        cfg = config.load(arguments.config, arguments.overrides)
        log.place(cfg.name)
        configure(cfg.storage.options)
        _stand_at_home()
        if checks:
            from pipelines.checks import run as check

            return check(cfg, arguments.job)
        body(cfg)
    except KeyboardInterrupt:
        log.line("interrupted; run the command again to resume", "ERROR")
        return 1
    except Exception as error:
        kept = traces.keep(cfg, error) if cfg and not checks else ""
        if isinstance(error, AdasidError):
            log.line(hidden(str(error), cfg) if cfg else masked_text(str(error)), "ERROR")
            return error.exit_code
        from adasid.faults import passing

        again = passing(error)
        hint = "; this fault passes: run the command again" if again else ""
        text = hidden(first_line(error), cfg) if cfg else first_line(error)
        log.line(f"{type(error).__name__}: {text[:300]}{hint}{kept}", "ERROR")
        return TransientError.exit_code if again else 1
    return 0


def entry(where: str, **arguments: Any) -> Callable[..., None]:
    """Return a function that imports and calls ``package.module:name`` with ``arguments``. The import waits for the
    call, so that a mistake in the config is reported before torch and the engines are loaded."""

    def call(*args: Any) -> None:
        module, _, name = where.partition(":")
        getattr(importlib.import_module(module), name)(*args, **arguments)

    return call


def stage(
    name: str, function: Callable[[config.Config, StageContext], None], migrates: bool = False
) -> Callable[[config.Config], None]:
    """Return a job's body that calls ``function`` inside the MLflow run of stage ``name``. ``migrates``: a lake of an
    older format is allowed."""

    def body(cfg: config.Config) -> None:
        log.place(cfg.name, name)
        from pipelines.engines.tracking import stage as tracked

        with tracked(cfg, name, migrates=migrates) as context:
            function(cfg, context)

    return body


def leave(code: int) -> None:
    """Stop Spark if it was started and end the process with ``code``, which no engine can change."""
    if sql := sys.modules.get("pyspark.sql"):
        with contextlib.suppress(Exception):
            session = sql.SparkSession.getActiveSession()
            if session is not None:
                session.stop()
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def _stand_at_home() -> None:
    """Change to the project's folder in a Ray job, whose working directory is a temporary copy, so that relative paths
    mean the same."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        return
    home = os.environ.get("ADASID_HOME") or _editable_home()
    if home:
        os.chdir(home)
    else:
        log.line(
            "inside a Ray job relative paths lead into its temporary copy; set ADASID_HOME or an absolute runs_dir",
            "WARN",
        )


def _editable_home() -> str | None:
    """Return the folder from which the project was installed with ``pip install -e``, else None."""
    for distribution in importlib.metadata.distributions(name="adasid"):
        text = distribution.read_text("direct_url.json")
        if text:
            direct = json.loads(text)
            if direct.get("dir_info", {}).get("editable"):
                return unquote(urlparse(direct["url"]).path)
    return None


def choose(
    arguments: Sequence[str] | None, description: str, *options: tuple[str, Sequence[str], str]
) -> argparse.Namespace:
    """Parse the common arguments and further ``(flag, choices, help)``; the first choice is the default."""
    parsed = parser(description)
    for flag, choices, text in options:
        parsed.add_argument(flag, choices=choices, default=choices[0], help=f"{text} (default: {choices[0]})")
    return parsed.parse_args(arguments)
