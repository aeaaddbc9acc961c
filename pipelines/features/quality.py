"""Measure the quality of content vectors on a sample of ``item_features``."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from adasid import tables
from adasid.config import Config
from adasid.errors import InputError
from adasid.metrics.content import Quality
from adasid.metrics.content import quality as measured
from pipelines import categories
from pipelines.engines.lake import Lake
from pipelines.engines.tracking import StageContext
from pipelines.stage import Inputs
from pipelines.training import parts

TABLE = "content_quality"
_SAMPLE, _GROUPS = 4000, 32
"""About the first number of items are measured; they are read from at most the second number of row groups."""


def write(cfg: Config, lake: Lake, version: int, inputs: Inputs, context: StageContext) -> int:
    """Write a row of ``content_quality`` for each content modality of ``item_features`` at ``version``; return the
    version written."""
    rows, content = list[dict[str, object]](), list(cfg.features.content)
    (stats,) = lake.read("catalog_stats").to_pylist()
    lacks = dict(stats["missing"] or ())
    sample = _sample(lake, version, ["item_id", *content])
    ids = sample["item_id"].combine_chunks()
    try:
        known = categories.of(cfg, lake, ids)
    except InputError as error:  # a file for studies does not stop the features
        context.note(f"content_quality has no agreement with categories: {error}", "WARN")
        known = {}
    kinds = np.array([known.get(item, -1) for item in ids.to_pylist()], np.int64)
    for modality in content:
        missing = lacks.get(modality, 0)
        found = _measured(cfg, sample[modality].combine_chunks(), kinds)
        number = len(ids) - sample[modality].null_count
        rows.append(
            {
                "input_hash": inputs.hash,
                "modality": modality,
                "items": stats["items"] - missing,
                "missing": missing,
                "sample": number,
                **found._asdict(),
                "neighbours": cfg.compare.neighbours,
                "near_duplicate": cfg.compare.near_duplicate,
            }
        )
        context.metrics({f"{modality}_{name}": value for name, value in found._asdict().items() if value is not None})
    return lake.write_rows(TABLE, tables.CONTENT_QUALITY, rows, inputs.hash, inputs.versions)


def _sample(lake: Lake, version: int, columns: list[str]) -> pa.Table:
    """Read about ``_SAMPLE`` items: some of each of at most ``_GROUPS`` row groups, evenly spaced in the order of
    popularity, so that the cost does not grow with the catalogue."""
    fragments = lake.open("item_features", version).to_pyarrow_dataset().get_fragments()
    groups = [(parts.span(group)[0], fragment, group) for fragment in fragments for group in fragment.row_groups]
    groups.sort(key=lambda found: found[0])
    chosen = [groups[place] for place in np.linspace(0, len(groups) - 1, min(_GROUPS, len(groups))).astype(int)]
    tables_read = []
    for _, fragment, group in chosen:
        rows = fragment.subset(row_group_ids=[group.id]).to_table(columns=columns)
        step = -(-rows.num_rows * len(chosen) // _SAMPLE)
        tables_read.append(rows.take(np.arange(0, rows.num_rows, max(1, step))))
    return pa.concat_tables(tables_read)


def _measured(cfg: Config, column: pa.Array, kinds: np.ndarray) -> Quality:
    present = column.is_valid().to_numpy(zero_copy_only=False)
    if not present.any():
        return Quality(None, None, None, None)
    flat = column.drop_null().flatten().to_numpy(zero_copy_only=False)
    vectors = flat.reshape(int(present.sum()), -1).astype(np.float32)
    return measured(vectors, kinds[present], cfg.compare.neighbours, cfg.compare.near_duplicate)
