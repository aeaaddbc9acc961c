"""Test the explanations of a number that is no plausible unix time."""

from datetime import datetime, timezone

import pytest

from adasid.datasets import units

NOW = datetime(2026, 6, 1, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("20200913", "'20200913' reads as the date 2020-09-13: write dates as YYYY-MM-DD"),
        ("2020", "'2020' reads as a year"),
        ("18518", "'18518' is 2020-09-13 if it counts days: multiply by 86400"),
        ("444444", "is 2020-09-13 if it counts hours: multiply by 3600"),
        ("26666666", "is 2020-09-13 if it counts minutes: multiply by 60"),
        ("44087", "is 2020-09-13 if it is a spreadsheet's serial day: subtract 25569, then multiply by 86400"),
        ("0", "'0' often stands for an unknown time: leave it empty and bring 'pos', or lower features.first_year"),
        ("0001-01-01", "often stands for an unknown time"),
        ("1970-01-01T00:00:00Z", "often stands for an unknown time"),
        ("-5", "give unix seconds, milliseconds, microseconds or nanoseconds"),
        ("99999999", "give unix seconds"),
        ("1975-03-02", "between features.first_year 1990 and 2026-06-01"),
        (
            "13/09/2020",
            "'13/09/2020': give unix seconds, milliseconds, microseconds or nanoseconds, or ISO 8601, between",
        ),
        ("9" * 5000, "give unix seconds"),
        ("\u00b2", "give unix seconds"),
    ],
)
def test_the_unit_that_would_fit_is_named(text, words):
    assert words in units.explain(text, 1990, NOW)
