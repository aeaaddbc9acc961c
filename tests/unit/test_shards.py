import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
import torch

from adasid.data.exchange import fetch
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


def test_vectors_are_mapped_where_it_is_said_and_space_is_checked_first(tmp_path, monkeypatch):
    table, _ = catalogue(items=50)
    reads = []

    def read(columns):
        reads.append(columns)
        return table.select(columns).to_batches()

    folder = tmp_path / "scratch"
    made = Shard(read, ("text",), in_memory=0, scratch=str(folder))
    assert isinstance(made._vectors["text"], np.memmap) and folder.is_dir() and not list(folder.iterdir())
    assert os.stat(folder).st_dev == os.stat(tmp_path).st_dev
    reads.clear()
    monkeypatch.setattr(shutil, "disk_usage", lambda where: shutil._ntuple_diskusage(9000, 5000, 4000))
    with pytest.raises(InputError, match=r"scratch: the vectors of this worker's 50 items need 4.8e-06 GB there, but"):
        Shard(read, ("text",), in_memory=0, scratch=str(folder))
    assert reads == [["item_index"], ["text"]], "the first rows, for the width"
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file: .* name another folder in ray\.scratch"):
        Shard(read, ("text",), in_memory=0, scratch=str(tmp_path / "file"))


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


class Threads(Workers):
    """One of several workers in threads, which meet at a barrier."""

    def meet(self, barrier, board):
        object.__setattr__(self, "barrier", barrier)
        object.__setattr__(self, "board", board)
        return self

    def gather(self, rows):
        self.board[self.rank] = rows
        self.barrier.wait(30)
        found = torch.cat([self.board[rank] for rank in range(self.world)])
        self.barrier.wait(30)
        return found

    def sum(self, tensor):
        return self.gather(tensor[None]).sum(0).to(tensor.dtype)


def together(world, function):
    """What ``function(workers)`` returns on each of ``world`` workers."""
    barrier, board = threading.Barrier(world), {}
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(lambda rank: function(Threads(rank, world).meet(barrier, board)), range(world)))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_partners_are_sent_by_the_worker_that_has_them_and_drawn_evenly(world):
    table, cluster = catalogue(items=200)
    whole = shard(table)

    def draw(workers):
        mine = shard(table, rank=workers.rank, world=world, cluster=cluster, workers=workers)
        return mine, [mine.take_pairs(np.arange(60), np.random.default_rng(seed)) for seed in range(30)]

    for rank, (mine, batches) in enumerate(together(world, draw) if world > 1 else [draw(Workers())]):
        assert mine.item_index.tolist() == list(range(rank, 200, world))
        assert sum(len(values) for values in mine._vectors.values()) == 3 * len(mine), "no partner is kept"
        drawn = {}
        for batch in batches:
            first, second = batch.index[:60].numpy(), batch.index[60:].numpy()
            assert first.tolist() == mine.item_index[:60].tolist()
            assert (cluster[first] == cluster[second]).all()
            assert batch.paired.all()
            reference = whole.take(batch.index.numpy())
            assert all(torch.equal(batch.vectors[m], reference.vectors[m]) for m in whole.widths)
            assert all(torch.equal(batch.present[m], reference.present[m]) for m in whole.widths)
            assert torch.equal(batch.richness, reference.richness) and torch.equal(batch.counts, reference.counts)
            for a, b in zip(first, second):
                drawn.setdefault(int(a), set()).add(int(b))
        assert np.mean([len(partners) for partners in drawn.values()]) > 2.5, "three partners each"


def test_an_item_without_partners_is_its_own():
    table, _ = catalogue(items=50)
    rows = lambda columns: table.select(columns).to_batches()  # noqa: E731
    data = Shard(rows, ("text",), pairs=Pairs(np.array([3, 3]), np.array([7, 9])))
    batch = data.take_pairs(np.array([2, 3, 49]), np.random.default_rng(0))
    assert batch.paired.tolist() == [False, True, False]
    assert batch.index[:3].tolist() == [2, 3, 49]
    assert batch.index[3].item() == 2
    assert batch.index[4].item() in {7, 9}
    assert batch.index[5].item() == 49


def test_pairs_of_items_without_features_are_left_out():
    table, _ = catalogue(items=5)
    some = table.take([0, 1, 2, 4])
    pairs = Pairs(np.array([0, 1, 3, 3, 2, 0]), np.array([4, 9, 0, 4, 4, 3]))
    data = Shard(lambda columns: some.select(columns).to_batches(), ("text",), pairs=pairs)
    batch = data.take_pairs(np.arange(3), np.random.default_rng(0))
    assert batch.index.tolist() == [0, 1, 2, 4, 1, 4]
    assert batch.paired.tolist() == [True, False, True]


def test_previous_codes_come_with_every_row_partners_too():
    table, cluster = catalogue(items=60)
    index = np.random.default_rng(0).permutation(58)  # two items are new today
    codes = pa.array(np.stack([index % 7, index % 5], 1).tolist(), pa.list_(pa.int32()))

    def draw(workers):
        mine = shard(table, ("text",), workers.rank, 2, cluster, workers)
        assert mine.take(np.arange(3)).previous is None and mine.previous(9) is None
        mine.hold([pa.record_batch({"item_index": pa.array(index), "codes": codes})], 2, 0.5)
        return mine, mine.take_pairs(np.arange(len(mine)), np.random.default_rng(0))

    for mine, batch in together(2, draw):
        assert set(batch.index.tolist()) - set(mine.item_index.tolist()), "some partners are the other worker's"
        assert batch.previous is not None and batch.previous.slack == 0.5
        known = batch.index < 58
        assert torch.equal(batch.previous.codes[known], torch.stack([batch.index % 7, batch.index % 5], 1)[known])
        assert (batch.previous.codes[~known] == PAD).all()
        own = mine.item_index[mine.item_index < 58]
        expected = torch.stack([torch.from_numpy(np.bincount(own % n, minlength=9)) for n in (7, 5)])
        assert torch.equal(mine.previous(9), expected)


def test_a_worker_fetches_a_single_row():
    rows = [torch.arange(6, dtype=torch.float32).view(2, 3), torch.tensor([True, False]), torch.tensor([7, 8])]
    found = fetch(np.array([9]), np.array([4, 9]), lambda at: [part[at] for part in rows], Workers())
    assert [part.tolist() for part in found] == [[[3.0, 4.0, 5.0]], [False], [8]]
