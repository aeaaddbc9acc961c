"""Test the search of neighbours and the quality of content vectors against full searches and closed forms."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake

from adasid import tables
from adasid.errors import InputError
from adasid.metrics import neighbours
from adasid.metrics.content import quality
from adasid.metrics.neighbours import nearest
from pipelines import categories
from pipelines.run import Run
from pipelines.sources import in_place


def test_neighbours_are_those_of_a_full_search(monkeypatch):
    monkeypatch.setattr(neighbours, "_BLOCK", 16)
    vectors = np.random.default_rng(0).standard_normal((70, 5)).astype(np.float32)
    vectors[[3, 40]] = 0
    places, cosines = nearest(vectors, 4)
    for item, row in enumerate(vectors):
        if item in (3, 40):
            assert (places[item] == -1).all()
            continue
        every = vectors @ row / np.maximum(np.linalg.norm(vectors, axis=1) * np.linalg.norm(row), 1e-9)
        every[[item, 3, 40]] = -2
        best = np.argsort(-every)[:4]
        assert places[item].tolist() == best.tolist()
        assert np.allclose(cosines[item], every[best], atol=1e-5)
    assert nearest(vectors[:3], 4)[0][0, 2:].tolist() == [-1, -1]
    assert (nearest(vectors[:1], 4)[0] == -1).all()


def test_quality_of_separate_categories_in_closed_form():
    """Three categories on orthogonal axes, four equal vectors each: all neighbours agree, all are duplicates."""
    kinds = np.repeat(np.arange(3), 4)
    found = quality(np.eye(3, dtype=np.float32)[kinds], kinds, neighbours=3)
    assert found.agreement == 1
    assert found.near_duplicates == 1
    assert found.chance == pytest.approx(3 / 11)
    assert found.effective_rank == pytest.approx(2)  # centred, three corners of a triangle span two equal directions


def test_unknown_categories_and_vectors_of_zeros_are_not_compared():
    vectors = np.float32([[1, 0], [1, 0.1], [0, 1], [0.1, 1], [0, 0], [1, 0.05]])
    found = quality(vectors, np.array([0, 0, 1, 0, 0, -1]), neighbours=2)
    # 0: {5, 1} -> 1 of 2; 1: {5, 0} -> 1 of 2; 2: {3, 1} -> 0; 3: {2, 1} -> 1 of 2; zeros and the unknown do not count
    assert found.agreement == pytest.approx((0.5 + 0.5 + 0 + 0.5) / 4)
    assert found.near_duplicates == pytest.approx(5 / 6)
    assert found.chance == pytest.approx(3 * 2 / (4 * 4))


def test_nothing_is_said_of_one_vector_or_without_categories():
    assert quality(np.ones((1, 3), np.float32), np.zeros(1, np.int64)) == (None, None, None, None)
    found = quality(np.ones((4, 3), np.float32), np.full(4, -1))
    assert found.effective_rank is None and found.agreement is None and found.near_duplicates == 1


@pytest.mark.parametrize("placed", [False, True])
def test_categories_are_read_wherever_the_items_are(make_config, tmp_path, placed):
    cfg = make_config(content={"encoders": {"text": {"fields": ["title", "categories"]}}})
    lake, ids = Run(cfg).lake, ["a", "b", "c", "d"]
    kinds = ["Beauty > Hair > Oil > x", "Beauty > Hair > Oil > y", "Beauty > Skin", None]
    if placed:
        own = {"item_id": ids, "categories": [kind and kind.split(" > ") for kind in kinds], "price": [1, 2, 3, 4]}
        write_deltalake(str(tmp_path / "items"), pa.table(own))
        in_place.write(lake, "items", in_place.Reference(str(tmp_path / "items"), 0), "h")
    else:
        rows = [{"item_id": i, "title": None, "categories": kind} for i, kind in zip(ids, kinds)]
        lake.write_rows("items", tables.items((), ("categories",)), rows, "h")
    found = categories.of(cfg, lake, pa.array(["a", "b", "c", "d", "none"]))
    assert found["a"] == found["b"] != found["c"] and found["d"] == -1 and set(found) == set(ids)
    assert set(categories.of(cfg, lake, pa.array(["c"]))) == {"c"}
    assert not categories.of(cfg, lake, pa.array([], pa.string()))


def test_a_file_of_categories_may_have_ids_that_are_numbers_and_must_know_the_items(make_config, tmp_path):
    file = tmp_path / "kinds.parquet"
    kinds = pa.array([["x", "y"], ["x", "z"], ["x", "y"]], pa.large_list(pa.string()))
    pq.write_table(pa.table({"item_id": pa.array([7, 8, 9]), "kinds": kinds}), file)
    cfg = make_config(compare={"categories": {"file": str(file), "column": "kinds", "depth": 2}})
    lake = Run(cfg).lake
    found = categories.of(cfg, lake, pa.array(["7", "8", "9", "10"]))
    assert found["7"] == found["9"] != found["8"] and set(found) == {"7", "8", "9"}
    with pytest.raises(InputError, match="has none of the items, such as item_id '007'"):
        categories.of(cfg, lake, pa.array(["007"]))
