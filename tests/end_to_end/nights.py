"""Generate days of a catalogue: the ``item_features`` of a nightly run from those of the day before."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from adasid.storage import ObjectPath
from pipelines.engines.lake import Lake
from tests.end_to_end.running import config_file, config_on_s3, lake_of

VECTORS = ("text", "visual", "behavior")


def next_day(
    table: pa.Table, seed: int, new: float = 0.02, changed: float = 0.02, removed: float = 0.01, noise: float = 0.3
) -> pa.Table:
    """Some items leave, some get other vectors, and some come that are near others; fingerprints follow the vectors."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(table.num_rows)
    counts = [round(share * table.num_rows) for share in (removed, changed, new)]
    gone, other, copied = np.split(order, np.cumsum(counts))[:3]
    kept = np.setdiff1d(np.arange(table.num_rows), gone)
    moved = _noisy(table.take(pa.array(np.sort(other))), rng, noise, f"c{seed}-")
    fresh = _noisy(table.take(pa.array(np.sort(copied))), rng, noise, f"n{seed}-")
    fresh = fresh.set_column(
        fresh.column_names.index("item_id"),
        fresh.schema.field("item_id"),
        pa.array([f"new{seed}-{i:05d}" for i in range(len(copied))]),
    )
    still = table.take(pa.array(np.setdiff1d(kept, other)))
    whole = pa.concat_tables([still, moved, fresh]).sort_by([("interactions", "descending"), ("item_id", "ascending")])
    index = whole.schema.field("item_index")
    return whole.set_column(whole.column_names.index("item_index"), index, pa.array(np.arange(whole.num_rows))).cast(
        table.schema
    )


def noisy(table: pa.Table, seed: int, share: float) -> pa.Table:
    """All vectors with noise of ``share`` of their norm."""
    return _noisy(table, np.random.default_rng(seed), share, f"z{seed}-").cast(table.schema)


def _noisy(table: pa.Table, rng: np.random.Generator, share: float, mark: str) -> pa.Table:
    for name in (name for name in VECTORS if name in table.column_names):
        column = table[name].combine_chunks()
        there = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
        if len(there):
            x = np.stack([np.asarray(row) for row in column.drop_null().to_pylist()]).astype(np.float32)
            step = rng.standard_normal(x.shape)
            x = x + share * np.linalg.norm(x, axis=1, keepdims=True) * step / np.linalg.norm(
                step, axis=1, keepdims=True
            )
            rows = [None] * table.num_rows
            for place, row in zip(there, x.astype(np.float32)):
                rows[place] = row
            field = table.schema.field(name)
            table = table.set_column(table.column_names.index(name), field, pa.array(rows, field.type))
    prints = pa.array([mark + old for old in table["fingerprint"].to_pylist()])
    return table.set_column(table.column_names.index("fingerprint"), table.schema.field("fingerprint"), prints)


def put(lake, table: pa.Table, stamp: str) -> int:
    """Today's ``item_features``, in one commit."""
    return lake.write("item_features", table.schema, table.to_batches(), stamp)


def follow(spark, lake):
    """From now on ``item_features`` has a change feed."""
    spark.sql(f"ALTER TABLE delta.`{lake.path('item_features')}` SET TBLPROPERTIES (delta.enableChangeDataFeed = true)")


def merge(spark, lake, today, update="t.fingerprint <> s.fingerprint"):
    """Today's ``item_features`` as single rows of the change feed."""
    spark.createDataFrame(today.to_pandas()).createOrReplaceTempView("today")
    spark.sql(
        f"MERGE INTO delta.`{lake.path('item_features')}` t USING today s ON t.item_id = s.item_id WHEN MATCHED AND "
        f"{update} THEN UPDATE SET * "
        "WHEN NOT MATCHED THEN INSERT * WHEN NOT MATCHED BY SOURCE THEN DELETE"
    )


def by_item(
    lake,
    version=None,
    columns=(
        "item_id",
        "codes",
        "weights",
        "active",
        "tokens",
        "collision_rank",
        "tokenizer",
        "generation",
        "fingerprint",
    ),
):
    """A version of ``sids``, by item."""
    return lake.read("sids", version, list(columns)).sort_by("item_id").combine_chunks()


def rows_of(table: pa.Table) -> dict:
    """item_id -> row."""
    return {row["item_id"]: row for row in table.to_pylist()}


def without(table: pa.Table, ids) -> pa.Table:
    """Rows of other items."""
    return table.filter(pc.invert(pc.is_in(table["item_id"], pa.array(list(ids)))))


def copied(shop, folder, bucket=None, **changes):
    """A copy of a shop in ``folder``, or of its run in ``bucket`` with the config and MLflow's store in ``folder``: its
    config file and its lake."""
    if bucket is None:
        shutil.copytree(shop, folder)
        return config_file(folder, "shop", **changes), lake_of(folder, "shop")
    target = ObjectPath.of(f"{bucket}/shop")
    for file in (shop / "runs" / "shop").rglob("*"):
        if file.is_file() and not file.name.startswith("mlflow.db"):
            (target / file.relative_to(shop / "runs" / "shop").as_posix()).upload(file)
    folder.mkdir(parents=True, exist_ok=True)
    return config_on_s3(folder, "shop", bucket, **changes), Lake(str(target / "lake"), {})
