"""Read Parquet files as Spark's workers do, without Spark."""

from datetime import datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from adasid import tables
from adasid.datasets.files import DataFile, read_row_groups
from adasid.errors import InputError
from pipelines.sources import parquet


def test_int96_times_do_not_wrap_around(tmp_path):
    """Spark writes them by default; in nanoseconds year 1 becomes 1754, and 2600 becomes 2015."""
    moments = [datetime(1, 1, 1), datetime(2020, 9, 13, 12, 26, 40), datetime(2600, 1, 1)]
    table = pa.table({"user_id": ["u"] * 3, "item_id": ["i"] * 3, "timestamp": pa.array(moments, pa.timestamp("us"))})
    pq.write_table(table, tmp_path / "e.parquet", use_deprecated_int96_timestamps=True)
    plan, tasks = [[(DataFile(str(tmp_path / "e.parquet"), ()), [0])]], iter([pa.record_batch({"id": [0]})])
    (batch,) = read_row_groups(plan, tables.INTERACTIONS, "source.tables.interactions", tasks)
    assert [text[:4] for text in batch["timestamp"].to_pylist()] == ["0001", "2020", "2600"]


def test_a_delta_table_is_not_read_as_a_folder_of_parquet_files(tmp_path):
    """Its folder keeps files of older versions: deleted rows would come back."""
    (tmp_path / "_delta_log").mkdir()
    pq.write_table(pa.table({"item_id": ["x"]}), tmp_path / "old.parquet")
    with pytest.raises(InputError, match=r"is a Delta table, .*: set source.tables.format: delta"):
        parquet.scan(None, "source.tables.items", str(tmp_path), parquet.items(["text"]), print)
