import numpy as np
import pyarrow as pa
import pytest
import torch

from adasid.data.shards import Pairs, Shard
from adasid.distributed import Workers
from adasid.errors import InputError
from adasid.tables import BEHAVIOR, PAD
from adasid.training.checkpoint import Checkpoints, optimizer_tensors, restore_optimizer
from tests.planted import catalogue, shard


def test_rows_come_back_in_item_order_whatever_the_order_of_reading():
    table, _ = catalogue(items=50)
    mixed = table.take(np.random.default_rng(0).permutation(50))
    a, b = shard(table), shard(mixed)
    assert a.item_index.tolist() == b.item_index.tolist() == list(range(50))
    rows = np.array([3, 40, 7])
    for m in ("text", "visual", BEHAVIOR):
        assert torch.equal(a.take(rows).vectors[m], b.take(rows).vectors[m])
        assert torch.equal(a.take(rows).present[m], b.take(rows).present[m])
    assert a.take(rows).vectors["text"].tolist() == [table["text"][i].as_py() for i in rows]
    assert not a.take(rows).present["visual"][0]
    assert (a.take(rows).vectors["visual"][0] == 0).all()
    assert sum(len(batch) for batch in a.scan(7)) == 50


def test_a_large_shard_is_memory_mapped_and_equal():
    table, _ = catalogue(items=50)
    small = shard(table)
    large = Shard(lambda columns: table.select(columns).to_batches(), ("text", "visual", BEHAVIOR), in_memory=0)
    assert isinstance(large._vectors["text"], np.memmap)
    assert torch.equal(small.take(np.arange(50)).vectors["text"], large.take(np.arange(50)).vectors["text"])


def test_unusable_features_are_named():
    table, _ = catalogue(items=20)
    with pytest.raises(InputError, match="no rows for this worker"):
        shard(table.slice(0, 0))
    nothing = table.set_column(table.schema.get_field_index("visual"), "visual", pa.nulls(20, pa.list_(pa.float32())))
    with pytest.raises(InputError, match="no item has this modality"):
        shard(nothing)
    two = [row if i else [1.0, 2.0] for i, row in enumerate(table["text"].to_pylist())]
    mixed = table.set_column(table.schema.get_field_index("text"), "text", pa.array(two, pa.list_(pa.float32())))
    with pytest.raises(InputError, match=r"text holds a vector of width 24, expected 2"):
        shard(mixed)


def test_checkpoints_survive_a_half_written_one_and_name_a_broken_one(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest(Workers()) is None
    for step in (1, 2, 3):
        checkpoints.save(step, {"a.x": torch.full((2,), float(step)), "b": torch.tensor(step)}, {"step": step})
    (tmp_path / ".draft-99").mkdir()
    (tmp_path / ".draft-99" / "tensors.safetensors").write_bytes(b"half")
    latest = checkpoints.latest(Workers())
    assert latest.state == {"step": 3}
    assert latest.under("a")["x"].tolist() == [3.0, 3.0]
    assert len(list(tmp_path.glob("step-*"))) == 2
    (tmp_path / "step-000000003" / "tensors.safetensors").write_bytes(b"broken")
    with pytest.raises(InputError, match="step-000000003: cannot be read"):
        checkpoints.latest(Workers())


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adagrad])
def test_optimiser_state_round_trips(kind):
    def steps(parameter, optimizer, number):
        for i in range(number):
            parameter.grad = torch.arange(3.0) + i
            optimizer.step()

    a = torch.nn.Parameter(torch.ones(3))
    whole = kind([a], lr=0.1)
    steps(a, whole, 3)
    b = torch.nn.Parameter(a.detach().clone())
    fresh = kind([b], lr=0.1)
    restore_optimizer(fresh, optimizer_tensors(whole))
    steps(a, whole, 2)
    steps(b, fresh, 2)
    assert torch.equal(a, b)


@pytest.mark.parametrize("world", [1, 2])
def test_partners_are_loaded_whoever_owns_them_and_drawn_evenly(world):
    table, cluster = catalogue(items=200)
    whole = shard(table)
    for rank in range(world):
        mine = shard(table, rank=rank, world=world, cluster=cluster)
        assert mine.item_index.tolist() == list(range(rank, 200, world))
        assert sum(len(batch) for batch in mine.scan()) == len(mine), "partners are not among the worker's own items"
        drawn = {}
        for seed in range(30):
            rows = np.arange(len(mine))
            batch = mine.take_pairs(rows, np.random.default_rng(seed))
            first, second = batch.index[: len(rows)].numpy(), batch.index[len(rows) :].numpy()
            assert first.tolist() == mine.item_index.tolist()
            assert (cluster[first] == cluster[second]).all()
            assert batch.paired.all()
            reference = whole.take(batch.index.numpy())
            assert all(torch.equal(batch.vectors[m], reference.vectors[m]) for m in whole.widths)
            assert torch.equal(batch.richness, reference.richness)
            for a, b in zip(first, second):
                drawn.setdefault(int(a), set()).add(int(b))
        assert np.mean([len(partners) for partners in drawn.values()]) > 2.5, "three partners each"


def test_an_item_without_partners_is_its_own():
    table, _ = catalogue(items=50)
    rows = lambda columns: table.select(columns).to_batches()  # noqa: E731
    data = Shard(rows, ("text",), pairs=Pairs(np.array([3, 3]), np.array([7, 9]), lambda columns: []))
    batch = data.take_pairs(np.array([2, 3, 49]), np.random.default_rng(0))
    assert batch.paired.tolist() == [False, True, False]
    assert batch.index[:3].tolist() == [2, 3, 49]
    assert batch.index[3].item() == 2
    assert batch.index[4].item() in {7, 9}
    assert batch.index[5].item() == 49


def test_pairs_of_items_without_features_are_left_out():
    table, _ = catalogue(items=5)
    own, other = table.slice(0, 3), table.slice(4, 1)
    pairs = Pairs(
        np.array([0, 1, 3, 3, 2]), np.array([4, 9, 0, 4, 4]), lambda columns: other.select(columns).to_batches()
    )
    data = Shard(lambda columns: own.select(columns).to_batches(), ("text",), pairs=pairs)
    batch = data.take_pairs(np.arange(3), np.random.default_rng(0))
    assert batch.index.tolist() == [0, 1, 2, 4, 1, 4]
    assert batch.paired.tolist() == [True, False, True]


def test_previous_codes_come_with_every_row_partners_too():
    table, cluster = catalogue(items=60)
    mine = shard(table, ("text",), 0, 2, cluster)
    assert mine.take(np.arange(3)).previous is None and mine.previous(9) is None
    index = np.random.default_rng(0).permutation(58)  # two items are new today
    codes = pa.array(np.stack([index % 7, index % 5], 1).tolist(), pa.list_(pa.int32()))
    mine.hold([pa.record_batch({"item_index": pa.array(index), "codes": codes})], 2, 0.5)
    batch = mine.take_pairs(np.arange(len(mine)), np.random.default_rng(0))
    assert set(batch.index.tolist()) - set(mine.item_index.tolist()), "some partners are the other worker's"
    assert batch.previous is not None and batch.previous.slack == 0.5
    known = batch.index < 58
    assert torch.equal(batch.previous.codes[known], torch.stack([batch.index % 7, batch.index % 5], 1)[known])
    assert (batch.previous.codes[~known] == PAD).all()
    own = mine.item_index[mine.item_index < 58]
    assert torch.equal(
        mine.previous(9), torch.stack([torch.from_numpy(np.bincount(own % n, minlength=9)) for n in (7, 5)])
    )
