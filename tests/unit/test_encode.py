"""Test the encoding of Arrow rows in a task: semantic IDs, faults of a vector, and reconstruction errors."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from adasid import config
from adasid.data.shards import batch_of
from adasid.tables import PAD
from adasid.tokenizers import artifact
from adasid.tokenizers.encode import ENCODED, encode_rows

WIDTHS = {"text": 6, "behavior": 3}


@pytest.fixture(scope="module")
def tokenizer():
    built = artifact.build(config.RqKmeansSettings(levels={"text": 2, "behavior": 1}, codebook_size=5), WIDTHS)
    torch.manual_seed(0)
    for m in WIDTHS:
        built.quantizers[m].get_buffer("centroids").normal_()
    return built


def rows(**changed):
    rng = np.random.default_rng(0)
    columns = {
        m: [row.astype(np.float32).tolist() for row in rng.standard_normal((8, width))] for m, width in WIDTHS.items()
    }
    columns["behavior"][3] = None
    for m, places in changed.items():
        for place, row in places.items():
            columns[m][place] = row
    number = pa.array(np.arange(8))
    plain = {
        "item_id": [f"i{i}" for i in range(8)],
        "item_index": number,
        "interactions": number,
        "stratum": ["tail"] * 8,
        "fingerprint": ["f"] * 8,
    }
    vectors = {m: pa.array(values, pa.list_(pa.float32())) for m, values in columns.items()}
    return pa.RecordBatch.from_pydict(
        {**plain, "richness": np.zeros(8, np.float32), **vectors, "sampled": np.arange(8) % 2 == 1}
    )


def test_items_sampled_for_drift_have_norms_and_squared_errors(tokenizer):
    plain = rows()
    found = encode_rows(tokenizer, plain)
    assert found.schema.equals(ENCODED) and found.column("fault").null_count == 8
    batch = batch_of(plain, WIDTHS)
    decoded = tokenizer.reconstruct(batch)
    for place, gauges in enumerate(found.column("gauges").to_pylist()):
        assert [g["modality"] for g in gauges] == (
            [] if place % 2 == 0 else ["text"] if place == 3 else ["text", "behavior"]
        )
        for g in gauges:
            x, y = batch.vectors[g["modality"]][place], decoded[g["modality"]][place]
            assert g["norm"] == pytest.approx(x.norm().item(), abs=1e-5)
            assert g["error"] == pytest.approx(((x - y) ** 2).sum().item(), rel=1e-5)


def test_a_faulty_vector_is_named_and_leaves_the_other_items_alone(tokenizer):
    plain = encode_rows(tokenizer, rows())
    found = encode_rows(tokenizer, rows(text={1: [0.0] * 7, 6: [float("nan")] * 6}, behavior={2: [1.0]}))
    faults = {1: "text has width 7, not 6", 2: "behavior has width 1, not 3", 6: "text is not finite"}
    assert {place: fault for place, fault in enumerate(found.column("fault").to_pylist()) if fault} == faults
    assert found.column("codes")[1].as_py()[:2] == [PAD, PAD]
    for place in set(range(8)) - set(faults):
        assert found.slice(place, 1).equals(plain.slice(place, 1)), place
