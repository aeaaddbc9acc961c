"""Keep the stack traces of the last errors of a run."""

from __future__ import annotations

import traceback
from datetime import datetime, timezone

from adasid.config import Config
from adasid.config.secrets import hidden
from adasid.errors import AdasidError
from adasid.files import write_text

_KEPT = 5
_LONGEST = 200_000
"""A trace of more characters loses its middle."""
_HEAD = "==== "


def keep(cfg: Config, error: BaseException) -> str:
    """Add the whole trace of an error, with its causes and without secrets, to the run's ``error.log``, before those of
    the errors before; return where it is, as the end of a line, or nothing where it cannot be written."""
    text = hidden("".join(traceback.format_exception(error)), cfg)
    text = text.encode(errors="backslashreplace").decode()  # a name of a file may have bytes that are no text
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]}\n...\n{text[-_LONGEST // 2 :]}"
    try:
        from pipelines.run import Run

        log = Run(cfg).error_log
        before = log.read_text(encoding="utf-8") if log.exists() else ""
        entries = [f"{_HEAD}{entry}" for entry in f"\n{before}".split(f"\n{_HEAD}")[1:]]
        head = f"{_HEAD}{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ} {type(error).__name__}\n"
        write_text(log, "\n".join([f"{head}{text}".rstrip("\n"), *entries[: _KEPT - 1]]))
    except (OSError, ImportError, AdasidError):
        return ""
    return f" (whole trace: {log})"
