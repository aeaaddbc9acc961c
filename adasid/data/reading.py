"""The form in which the rows of a table come to this package: a function that streams them, however large they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pyarrow as pa

Read = Callable[[list[str]], Iterable[pa.RecordBatch]]
"""``read(columns)`` streams the rows of a table as Arrow batches of these columns. It may be called several times."""
