"""Test what a training worker reads and keeps: its own part of the tables, once, with little more than that in
memory."""

import tracemalloc
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from deltalake import WriterProperties, write_deltalake

from adasid import config, tables
from adasid.data import events as events_module
from adasid.data.events import read_events
from adasid.data.samples import Sample
from adasid.data.sequences import read_histories
from adasid.data.text import hashed_text
from adasid.distributed import Workers
from adasid.errors import InputError
from adasid.sid import Slot
from pipelines.engines.lake import Lake
from pipelines.training import parts, workers
from pipelines.training.payload import Catalogue, Payload
from pipelines.training.sids import read_catalogue
from tests.planted import catalogue

USERS, BUCKETS = 600, 8
CFG = config.Config(name="t", ray={"workers": 0})


class Alone(Workers):
    """One of several workers, who does not wait for the others."""

    def agree(self, ok, device="cpu"):
        return ok


def sequences(users=USERS, seed=0):
    rng = np.random.default_rng(seed)
    index = np.repeat(rng.permutation(users), 3)
    lengths = rng.integers(1, 9, len(index))
    return pa.table(
        {
            "user_index": index,
            "split": np.tile(tables.SPLITS, users),
            "history": pa.array([list(rng.integers(0, 99, n)) for n in lengths], pa.list_(pa.int64())),
            "target": pa.array([None if i % 3 == 0 else i % 99 for i in range(len(index))], pa.int64()),
            "bucket": pa.array(index * 7 % BUCKETS, pa.int32()),
        }
    )


def samples(users=USERS, seed=0):
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 9, users)
    position = np.concatenate([np.arange(n) for n in counts])
    index, size = np.repeat(np.arange(users) * 2, counts), int(counts.sum())
    columns = {
        "user_index": index,
        "position": position,
        "item_index": rng.integers(0, 99, size),
        "label": pa.array(rng.integers(0, 2, size), pa.int32(), mask=rng.random(size) < 0.1),
        "in_history": rng.random(size) < 0.8,
        "time": pa.array(position // 2 * 10**6, pa.timestamp("us", tz="UTC"), mask=index % 14 == 0),
        "split": rng.choice([*tables.SPLITS, tables.RANKING_ONLY], size),
        "bucket": pa.array(index // 2 * 5 % BUCKETS, pa.int32()),
    }
    return pa.table(columns).take(rng.permutation(size))


@pytest.fixture
def lake(tmp_path):
    made = Lake(str(tmp_path), {})
    write_deltalake(made.path("sequences"), sequences(), partition_by=["bucket"])
    write_deltalake(made.path("ranking_samples"), samples(), partition_by=["bucket"])
    small = WriterProperties(max_row_group_size=10)
    write_deltalake(made.path("item_features"), catalogue(items=1000)[0], writer_properties=small)
    return made


@pytest.fixture
def touched(monkeypatch):
    """The files and row groups that were read since it was last cleared."""
    found, chosen = [], parts._chosen

    def recording(dataset, buckets, part):
        for fragment, groups in chosen(dataset, buckets, part):
            found.extend((fragment.path, group) for group in groups)
            yield fragment, groups

    monkeypatch.setattr(parts, "_chosen", recording)
    return found


def read_by(touched, world, read):
    """What each worker reads, and the row groups that it touches."""
    for rank in range(world):
        touched.clear()
        yield read(Alone(rank, world)), set(touched)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("table", ["sequences", "ranking_samples"])
def test_no_row_of_a_user_is_read_by_two_workers(lake, touched, table, world):
    cfg = CFG

    def read(mine):
        chosen = parts.buckets_of(lake, table, 0, cfg, mine)
        return [row for rows in parts.rows(lake, table, 0, ["user_index"], chosen) for row in rows[0].to_pylist()]

    users, groups = zip(*read_by(touched, world, read))
    everyone = lake.read(table, columns=["user_index"])["user_index"].to_pylist()
    assert sorted(chain(*users)) == sorted(everyone)
    assert sum(len(set(part)) for part in users) == len(set(everyone)), "a user is one worker's"
    assert sum(map(len, groups)) == len(set().union(*groups)) == BUCKETS, "no file is opened by two workers"


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_no_row_group_of_item_features_is_read_by_two_workers(lake, touched, world):
    def read(mine):
        part = parts.item_part(lake, "item_features", 0, mine)
        touched.clear()
        batches = list(parts.rows(lake, "item_features", 0, ["text"], items=part))
        assert all(rows.schema.names == ["text"] for rows in batches)
        batches = parts.rows(lake, "item_features", 0, ["item_index"], items=part)
        return [i for rows in batches for i in rows[0].to_pylist()]

    items, groups = zip(*read_by(touched, world, read))
    assert sorted(chain(*items)) == list(range(1000))
    assert len(set().union(*groups)) == 100
    assert sum(map(len, groups)) <= (100 if world < 8 else 100 + 4 * 8), "of eight workers, ranges are too short"
    assert max(map(len, items)) - min(map(len, items)) <= 40
    assert np.ptp([np.mean(part) for part in items]) < 15, "all have popular items and others"


def test_a_small_table_of_items_is_divided_evenly_over_all_popularities(lake):
    write_deltalake(lake.path("few"), catalogue(items=301)[0].select(["item_index"]))
    found = [
        np.concatenate([rows[0].to_numpy() for rows in parts.rows(lake, "few", 0, ["item_index"], items=part)])
        for part in (parts.item_part(lake, "few", 0, Workers(rank, 4)) for rank in range(4))
    ]
    assert sorted(np.concatenate(found)) == list(range(301))
    assert max(map(len, found)) - min(map(len, found)) <= 16
    assert np.ptp([part.mean() for part in found]) < 10


def test_fewer_buckets_than_workers_name_the_setting(lake):
    cfg = config.Config(name="t", features={"user_buckets": 2})
    with pytest.raises(InputError, match=r"features\.user_buckets is 2, fewer than the 3 workers"):
        parts.buckets_of(lake, "sequences", 0, cfg, Workers(0, 3))


def test_buckets_of_other_settings_are_read_all_the_same(lake):
    cfg = config.Config(name="t", features={"user_buckets": 3})
    found = [parts.buckets_of(lake, "sequences", 0, cfg, Workers(rank, 3)) for rank in range(3)]
    assert found == [[0, 3, 6], [1, 4, 7], [2, 5]]


@pytest.mark.parametrize("world", [1, 3])
def test_histories_are_those_of_the_table_in_the_order_of_users_and_cut(lake, world):
    cfg, rows = CFG, lake.read("sequences").sort_by("user_index").to_pylist()
    for rank in range(world):
        lengths = {"train": 3, "validation": None, "test": 1}
        found = workers._histories(lake, {"sequences": 0}, Alone(rank, world), cfg, lengths, {})
        for split, length in lengths.items():
            mine = [row for row in rows if row["split"] == split and row["bucket"] % world == rank]
            h = found[split]
            assert h.items.dtype == np.int32
            cut = [row["history"][-(length or 99) :] for row in mine]
            assert [h.items[a:b].tolist() for a, b in zip(h.starts, h.starts[1:])] == cut
            assert h.targets.tolist() == [-1 if row["target"] is None else row["target"] for row in mine]


def test_a_worker_without_a_user_is_named(lake):
    cfg = CFG.model_copy(update={"features": config.Features(user_buckets=16)})
    with pytest.raises(InputError, match=r"no user with at least two training events for one of 16 workers"):
        workers._histories(lake, {"sequences": 0}, Alone(9, 16), cfg, dict.fromkeys(tables.SPLITS), {})


def test_the_sample_of_users_does_not_depend_on_the_number_of_workers_nor_on_ids():
    users = np.arange(1000) ** 2
    sample = Sample(150, Workers())
    whole = sample.chosen(users)
    assert whole.sum() == 150 and all(Sample(number, Workers()).chosen(users).all() for number in (1000, 2000))
    assert abs(np.flatnonzero(whole).mean() - 500) < 4 * 1000 / np.sqrt(12 * 150), "ids may be in the order of age"
    order = np.random.default_rng(0).permutation(1000)
    np.testing.assert_array_equal(sample.chosen(users[order]), whole[order])
    for half in (order[:500], order[500:]):
        possible = sample.possible(users[half])
        assert possible.sum() == 150 and possible[whole[half]].all(), "no user of the sample is left out of a part"


def test_histories_of_a_sample_are_read_alone(lake):
    lengths = {"train": 3, "validation": None, "test": 5}
    every = workers._histories(lake, {"sequences": 0}, Workers(), CFG, lengths, {})
    some = workers._histories(lake, {"sequences": 0}, Workers(), CFG, lengths, {"validation": 7, "test": 10**6})
    rows = lake.read("sequences").filter(pc.field("split") == "validation").sort_by("user_index")
    chosen = Sample(7, Workers()).chosen(rows["user_index"].to_numpy())
    mine = np.arange(7)
    assert some["validation"].targets.tolist() == every["validation"].targets[chosen].tolist()
    assert some["validation"].last(mine).tolist() == every["validation"].last(np.flatnonzero(chosen)).tolist()
    assert len(some["validation"].items) == int(np.diff(every["validation"].starts)[chosen].sum())
    assert some["train"].items.tolist() == every["train"].items.tolist()
    assert some["test"].items.tolist() == every["test"].items.tolist()


def test_events_are_those_of_the_table_by_user_and_time(monkeypatch):
    table = samples()
    monkeypatch.setattr(events_module, "_CHUNK", 50)
    found = read_events(lambda columns: table.select(columns).to_batches(max_chunksize=77))
    rows = table.sort_by([("user_index", "ascending"), ("position", "ascending")])
    assert found.ids[found.users].tolist() == rows["user_index"].to_pylist()
    assert found.items.tolist() == rows["item_index"].to_pylist()
    assert found.labels.tolist() == rows["label"].fill_null(-1).to_pylist()
    visits = rows["in_history"].to_numpy()
    assert found.visited.tolist() == found.items[visits].tolist()
    moments = list(zip(found.users.tolist(), rows["time"].to_pylist(), range(len(found))))
    for n, (user, time, _) in enumerate(moments):
        moment = [e for other, at, e in moments if time is not None and (other, at) == (user, time)]
        slate = not all(visits[e] for e in moment)
        assert found.before[n] == visits[: moment[0] if slate else n].sum()
    first = [int(visits[: found.starts[user]].sum()) for user in found.users]
    assert found.first(np.arange(len(found))).tolist() == first
    kinds = {name: place for place, name in enumerate(tables.SPLITS)} | {tables.RANKING_ONLY: 0}
    assert found.splits.tolist() == [kinds[name] for name in rows["split"].to_pylist()]
    assert [found.items.dtype, found.labels.dtype, found.splits.dtype] == [np.int32, np.int8, np.int8]
    chosen = [
        n for n in range(len(found)) if found.splits[n] == 2 and found.labels[n] == 1 and found.before[n] > first[n]
    ]
    assert found.chosen(2, 1).tolist() == chosen


def peak(function):
    """The result, and the most memory of numpy in its making."""
    tracemalloc.start()
    try:
        return function(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("events", [8, 30])
def test_histories_take_little_more_memory_than_is_kept(events):
    users, size = 60_000, 500
    lists = pa.ListArray.from_arrays(
        np.arange(0, 3 * size * events + 1, events, dtype=np.int32), np.arange(3 * size * events) % 1000
    )

    def read(columns):
        for start in range(0, users, size):
            index = pa.array(np.tile(users - 1 - np.arange(start, start + size), 3))
            rows = {"user_index": index, "split": pa.array(np.repeat(tables.SPLITS, size)), "history": lists}
            yield pa.record_batch({**rows, "target": pa.nulls(3 * size, pa.int64())}).select(columns)

    samples = {split: Sample(1000, Workers()) for split in ("validation", "test")}
    found, most = peak(lambda: read_histories(read, {"train": 20, "validation": 19, "test": 19}, samples))
    kept = sum(array.nbytes for histories in found.values() for array in histories)
    assert [len(found[split]) for split in tables.SPLITS] == [users, 1000, 1000]
    assert len(found["train"].items) == users * min(20, events)
    assert most < 1.5 * kept, f"{most / kept:.2f} times"


def test_events_take_little_more_memory_than_is_kept(monkeypatch):
    monkeypatch.setattr(events_module, "_CHUNK", 1 << 12)
    users, size = 40_000, 1000
    rows = {"label": pa.array(np.ones(size, np.int32)), "in_history": pa.array(np.ones(size, bool))}
    rows |= {"item_index": pa.array(np.arange(size)), "split": pa.array(["train"] * size)}

    def read(columns):
        for position in range(10):
            for start in range(0, users, size):
                index = {
                    "user_index": pa.array(np.arange(start, start + size)),
                    "position": pa.array([position] * size),
                }
                yield pa.record_batch(rows | index).select(columns)

    found, most = peak(lambda: read_events(read))
    arrays = {id(array): array.nbytes for array in vars(found).values()}
    assert len(found) == 10 * users and found.items is found.visited
    assert most < 1.6 * sum(arrays.values()), f"{most / sum(arrays.values()):.2f} times"


def test_more_than_2_to_the_31_events_are_no_limit():
    events, zeros = 1 << 26, pa.py_buffer(np.zeros(1 << 26, np.int64))  # pages that nobody writes cost nothing
    values = pa.Array.from_buffers(pa.int64(), events, [None, zeros])
    history = pa.ListArray.from_arrays(np.array([0, events], np.int32), values)

    def read(columns):
        for user in range(40):
            rows = {"user_index": pa.array([user]), "history": history, "target": pa.array([user])}
            yield pa.record_batch(rows).select(columns)

    found = read_histories(read, {None: 20})[None]
    assert 40 * events > 2**31 and len(found.items) == 800 and found.targets.tolist() == list(range(40))


def test_texts_are_hashed_as_their_bytes():
    texts = ["", "a", "foobar", "ähnlich", "a" * 40, "item-00001"]
    for kind in (pa.string(), pa.large_string()):
        column = pa.array(["first", *texts], kind).slice(1)
        for salt in (0, 3):
            expected = []
            for text in texts:
                number = 0xCBF29CE484222325
                for byte in ([salt] if salt else []) + list(text.encode()):
                    number = (number ^ byte) * 0x100000001B3 % 2**64
                expected.append(number)
            assert hashed_text(column, salt).tolist() == expected
    assert hashed_text(pa.array(["foobar"]))[0] == 0x85944171F73967E8, "the published value"
    assert len(hashed_text(pa.array([], pa.string()))) == 0


def test_semantic_ids_are_joined_to_the_items_in_any_order(lake, tmp_path):
    items, rng = 500, np.random.default_rng(0)
    index = rng.permutation(items)
    stats = {"item_id": [f"item {i}" for i in index], "item_index": index, "interactions": items - index}
    write_deltalake(lake.path("item_stats"), pa.table(stats | {"stratum": np.array(tables.STRATA)[index % 4]}))
    index = rng.permutation(items)
    codes = np.stack([index % 7, index % 5], 1).astype(np.int32)
    sids = {
        "item_id": [f"item {i}" for i in index],
        "codes": list(codes),
        "weights": list((codes / 4).astype(np.float32)),
    }
    table = pa.table(sids | {"active": [[True, i % 3 > 0] for i in index]})
    write_deltalake(lake.path("sids"), table)
    cfg = CFG
    chosen = Catalogue(table="sids", version=0, slots=(Slot("a", "text", 7), Slot("b", "behavior", 5)))
    payload = Payload(
        config=cfg, lake=lake.root, read={"item_stats": 0}, folder=tmp_path, library_versions={}, catalogue=chosen
    )
    every = np.arange(items)
    for settings in (cfg.ranking, cfg.retrieval, config.Ranking(inactive="pad", weights=False)):
        tokens, counts, strata = read_catalogue(lake, payload, settings)
        second = np.where(every % 3 > 0, every % 5, tables.PAD) if settings.inactive == "pad" else every % 5
        assert tokens.codes.tolist() == np.stack([every % 7, second], 1).tolist()
        factors = np.stack([every % 7, every % 5], 1) / 4 if settings.weights else np.ones((items, 2))
        np.testing.assert_allclose(tokens.weights, factors)
        assert counts.tolist() == (items - every).tolist() and strata.tolist() == (every % 4).tolist()
    tokens, _, _ = read_catalogue(lake, payload.model_copy(update={"catalogue": None}), cfg.ranking)
    assert tokens.rows[:, 0].tolist() == every.tolist()
    write_deltalake(lake.path("sids"), table.slice(1), mode="overwrite")
    missing = payload.model_copy(update={"catalogue": chosen.model_copy(update={"version": 1})})
    with pytest.raises(InputError, match=r"sids version 1 has 499 items, of which 499 are among the 500 of item_stats"):
        read_catalogue(lake, missing, cfg.ranking)
