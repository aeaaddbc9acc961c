"""Find the categories of items, to compare what codes or vectors say with what items are."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from adasid import tables
from adasid.config import Categories, Config
from adasid.errors import InputError, first_line
from adasid.faults import wrapped
from pipelines.engines.lake import Lake
from pipelines.sources import in_place

RAW = "categories"
"""Raw field of items that is read where ``compare.categories`` names no file."""
_PARTS = r"\s*(?: > |/|\|)\s*|,\s+"


def of(cfg: Config, lake: Lake, items: pa.Array) -> dict[str, int]:
    """Map those of the ``items`` that have a category to its number: from the file of ``compare.categories``, from the
    topics of a synthetic catalogue, or from the raw field ``categories`` that an encoder reads; empty where none is
    known. Raises InputError for a file that cannot be read, or has none of the items."""
    wanted = pc.field("item_id").isin(items)
    if cfg.compare.categories:
        ids, kinds = _of_file(cfg.compare.categories, items)
    elif cfg.source.synthetic and lake.exists("truth"):
        truth = lake.open("truth").to_pyarrow_dataset().to_table(columns=["item_id", "topic"], filter=wanted)
        ids, kinds = truth["item_id"], truth["topic"].combine_chunks()
    elif RAW in cfg.content.raw()[0] and (in_place.reference(lake, "items") or RAW in lake.schema("items").names):
        found = list(in_place.batches(lake, "items", tables.items((), (RAW,)), wanted))
        rows = pa.Table.from_batches(found) if found else tables.items((), (RAW,)).empty_table()
        ids, kinds = rows["item_id"], _numbers(_broad(rows[RAW].combine_chunks()))
    else:
        return {}
    return dict(zip(ids.to_pylist(), kinds.to_pylist()))


def _of_file(source: Categories, items: pa.Array) -> tuple[pa.ChunkedArray, pa.Array]:
    ids = pc.field("item_id").cast(pa.string())  # of numbers, too, as in a source
    try:
        rows = ds.dataset(source.file, format="parquet")
        table = rows.to_table({"item_id": ids, "kind": pc.field(source.column)}, ids.isin(items.cast(pa.string())))
    except (OSError, pa.ArrowException, KeyError) as error:
        raise wrapped(
            error,
            f"compare.categories {source.file}: cannot be read ({first_line(error)}); give a Parquet file with item_id "
            f"and {source.column}",
        ) from error
    if len(items) and not table.num_rows:
        raise InputError(
            f"compare.categories {source.file}: has none of the items, such as item_id {items[0].as_py()!r}; give a "
            "file with the ids of the source"
        )
    column = table["kind"]
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        column = pc.binary_join(pc.list_slice(column, 0, source.depth), "/")
    return table["item_id"], _numbers(column.combine_chunks())


def _broad(texts: pa.Array) -> pa.Array:
    """Return the first three parts of categories, which are joined by >, /, | or commas."""
    parts = pc.split_pattern_regex(pc.fill_null(texts, ""), _PARTS)
    broad = pc.binary_join(pc.list_slice(parts, 0, 3), "/")
    return pc.if_else(pc.equal(broad, ""), pa.scalar(None, pa.string()), broad)


def _numbers(texts: pa.Array) -> pa.Array:
    """Number the distinct texts; -1 for null."""
    return pc.fill_null(texts.dictionary_encode().indices, -1)
