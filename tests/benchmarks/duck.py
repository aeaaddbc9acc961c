"""Build the tables of the first part of build_features in DuckDB, from the same items and interactions: what one
machine can do. ``python tests/benchmarks/duck.py LAKE OUT THREADS`` prints the seconds."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import duckdb
from deltalake import DeltaTable

LENGTH = 50
"""features.max_length"""

_EVENTS = """
CREATE TABLE ordered AS
WITH clean AS (
    SELECT user_id, item_id, min(t) AS t FROM (
        SELECT user_id, item_id, try_cast("timestamp" AS BIGINT) AS t
        FROM read_parquet({interactions}))
    WHERE user_id IS NOT NULL AND t IS NOT NULL
        AND item_id IN (SELECT item_id FROM read_parquet({items}))
    GROUP BY user_id, item_id, t)
SELECT *, row_number() OVER (PARTITION BY user_id ORDER BY t, item_id) - 1 AS position,
    count(*) OVER (PARTITION BY user_id) AS events
FROM clean"""
_SPLIT = """
CREATE TABLE split AS SELECT *, CASE
    WHEN events >= 3 AND position = events - 1 THEN 'test'
    WHEN events >= 3 AND position = events - 2 THEN 'validation'
    ELSE 'train' END AS split
FROM ordered"""
_STATS = """
CREATE TABLE stats AS
WITH counts AS (
    SELECT item_id, count(*) AS interactions, count(DISTINCT user_id) AS users
    FROM split WHERE split = 'train' GROUP BY 1)
SELECT item_id, coalesce(interactions, 0) AS interactions, coalesce(users, 0) AS users,
    row_number() OVER (ORDER BY coalesce(interactions, 0) DESC, item_id) - 1 AS item_index
FROM read_parquet({items}) LEFT JOIN counts USING (item_id)"""
_TABLES = {
    "item_stats": """
SELECT *, CASE WHEN interactions = 0 THEN 'cold' WHEN item_index < n // 4 THEN 'head'
    WHEN item_index >= n - n // 4 THEN 'tail' ELSE 'mid' END AS stratum
FROM stats, (SELECT count(*) AS n FROM stats)""",
    "user_stats": """
SELECT user_id, count(*) AS interactions, count(DISTINCT item_id) AS items
FROM split WHERE split = 'train' GROUP BY 1""",
    "ranking_samples": """
SELECT user_id, position, item_index, 1 AS label, split, t FROM split JOIN stats USING (item_id)""",
    "sequences": """
WITH histories AS (
    SELECT user_id, list(item_index ORDER BY position) AS items, count(*) FILTER (split = 'train') AS train,
        min(position) FILTER (split = 'validation') AS validation, min(position) FILTER (split = 'test') AS test
    FROM split JOIN stats USING (item_id) GROUP BY 1)
SELECT user_id, 'train' AS split, items[greatest(train - {length}, 1):train] AS history, NULL::BIGINT AS target
FROM histories WHERE train >= 2
UNION ALL SELECT user_id, 'validation', items[greatest(validation - {length} + 1, 1):validation], items[validation + 1]
FROM histories WHERE validation >= 1
UNION ALL SELECT user_id, 'test', items[greatest(test - {length} + 1, 1):test], items[test + 1]
FROM histories WHERE test >= 1""",
}


def build(lake: str, out: str, threads: int) -> float:
    """Write the tables as Parquet below ``out``; return the seconds."""
    Path(out).mkdir(parents=True, exist_ok=True)
    connection = duckdb.connect(config={"threads": threads, "memory_limit": "12GB", "temp_directory": out})
    connection.execute("SET preserve_insertion_order = false")
    started = time.perf_counter()
    read = {name: DeltaTable(f"{lake}/{name}").file_uris() for name in ("items", "interactions")}
    for statement in (_EVENTS, _SPLIT, _STATS):
        connection.execute(statement.format(**read))
    for name, query in _TABLES.items():
        connection.execute(f"COPY ({query.format(length=LENGTH)}) TO '{out}/{name}.parquet'")
    return time.perf_counter() - started


if __name__ == "__main__":
    print(round(build(sys.argv[1], sys.argv[2], int(sys.argv[3])), 2))
