"""This module defines the errors that a user can act on. Each message is one line and names the thing, the value and
the fix."""

from __future__ import annotations


class AdasidError(Exception):
    """This is the base of all expected failures. ``exit_code`` is what a job returns to the shell."""

    exit_code = 1


class ConfigError(AdasidError):
    """The configuration or the command line is wrong (exit code 2)."""

    exit_code = 2


class InputError(AdasidError):
    """An input table, file or artifact is missing or invalid (exit code 3)."""

    exit_code = 3


class BusyError(AdasidError):
    """Another run holds the lease."""

    exit_code = 5


class GateError(AdasidError):
    """A quality gate refused to publish; the live generation stays live (exit code 4)."""

    exit_code = 4


class TransientError(AdasidError):
    """A fault that passes, such as a full disk, a lost executor or a server that is away (exit code 75, EX_TEMPFAIL):
    the same command succeeds later."""

    exit_code = 75


class TrainingError(AdasidError):
    """Training cannot continue, for example because a loss is not finite (exit code 1)."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if the message is empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
