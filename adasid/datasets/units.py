"""Explain a number that is not a plausible unix time."""

from __future__ import annotations

from contextlib import suppress
from datetime import date, datetime, timedelta, timezone

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_UNITS = {"days": 86_400, "hours": 3_600, "minutes": 60}
_SERIAL = 25_569  # days from the spreadsheets' 1899-12-30 to 1970-01-01


def explain(text: str, first_year: int, now: datetime) -> str:
    """Return the meaning of ``text`` that falls between ``first_year`` and ``now``, with the fix, for an error
    message."""
    example, low = f"for example {text[:40]!r}", datetime(first_year, 1, 1, tzinfo=timezone.utc)
    digits = text.removeprefix("+")
    if digits.isascii() and digits.isdigit() and len(digits) < 20:
        number = int(digits)
        if len(digits) == 8:
            with suppress(ValueError):
                day = date(number // 10_000, number // 100 % 100, number % 100)
                if low.date() <= day <= now.date():
                    return f"{example} reads as the date {day}: write dates as YYYY-MM-DD"
        if low.year <= number <= now.year:
            return f"{example} reads as a year: write dates as YYYY-MM-DD"
        if number:
            for unit, seconds in _UNITS.items():
                with suppress(OverflowError):
                    moment = _EPOCH + timedelta(seconds=number * seconds)
                    if low <= moment <= now:
                        return (
                            f"{example} is {moment:%Y-%m-%d} if it counts {unit}: multiply by {seconds} to have "
                            "unix seconds"
                        )
            with suppress(OverflowError):
                moment = _EPOCH + timedelta(days=number - _SERIAL)
                if low <= moment <= now:
                    return (
                        f"{example} is {moment:%Y-%m-%d} if it is a spreadsheet's serial day: subtract {_SERIAL}, "
                        "then multiply by 86400"
                    )
    unknown = digits == "0" or text.startswith(("0000-", "0001-", "1900-01-01", "1970-01-01"))
    if unknown:
        return (
            f"{example} often stands for an unknown time: leave it empty and bring 'pos', or lower features.first_year"
        )
    accepted = "unix seconds, milliseconds, microseconds or nanoseconds, or ISO 8601"
    return f"{example}: give {accepted}, between features.first_year {first_year} and {now:%Y-%m-%d}"
