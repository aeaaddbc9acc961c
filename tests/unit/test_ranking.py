"""Test click-through prediction over semantic IDs: metrics against scikit-learn, the network's parts, and training on
clicks with a known rule."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

from adasid import config
from adasid.data.events import read_events
from adasid.data.samples import Sample
from adasid.distributed import Workers
from adasid.errors import InputError
from adasid.metrics.ranking import auc, ranking_metrics, user_auc
from adasid.recommenders import ppnet
from adasid.recommenders.ngrams import hashed_index
from adasid.recommenders.ppnet import Gate, ItemVectors, PPNet
from adasid.recommenders.tokens import ItemTokens
from adasid.sid import Slot
from adasid.tables import BEHAVIOR, PAD, RANKING_ONLY, RANKING_SCORES, SPLITS
from adasid.training.ranking import RankingData, RankingTraining

SLOTS = (Slot("t0", "text", 4), Slot("b0", BEHAVIOR, 5))


def test_auc_is_scikit_learns_with_ties_and_weights():
    rng = np.random.default_rng(0)
    labels, scores, weights = rng.integers(0, 2, 300), rng.integers(0, 20, 300).astype(float), rng.random(300)
    assert auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))
    assert auc(scores, labels, weights) == pytest.approx(roc_auc_score(labels, scores, sample_weight=weights))
    assert np.isnan(auc(scores, np.ones(300, np.int64)))


def test_gauc_is_the_mean_of_the_users_aucs_weighted_by_their_samples():
    rng = np.random.default_rng(1)
    users, labels, scores = (
        rng.integers(0, 40, 150),
        (rng.random(150) < 0.3).astype(np.int64),
        rng.integers(0, 9, 150).astype(float),
    )
    own = {u: (users == u) for u in np.unique(users) if 0 < labels[users == u].sum() < (users == u).sum()}
    expected = {u: roc_auc_score(labels[rows], scores[rows]) for u, rows in own.items()}
    found, size = user_auc(users, scores, labels)
    np.testing.assert_allclose(found, list(expected.values()))
    np.testing.assert_array_equal(size, [rows.sum() for rows in own.values()])
    metrics = ranking_metrics(users, scores, labels, 100)
    assert metrics["gauc"] == pytest.approx(np.average(list(expected.values()), weights=size))
    assert metrics["gauc_users"] == len(own) < 40
    for name in ("auc", "gauc"):
        low, high = metrics[f"{name}_interval"]
        assert low < metrics[name] < high


def test_gauc_of_one_user_is_auc():
    rng = np.random.default_rng(2)
    labels, scores = rng.integers(0, 2, 50), rng.normal(size=50)
    found = ranking_metrics(np.zeros(50, np.int64), scores, labels, 100)
    assert found["gauc"] == pytest.approx(found["auc"])
    assert not [name for name in found if name.endswith("interval")], "one user says nothing of the spread"
    assert set(ranking_metrics(np.zeros(3, np.int64), scores[:3], np.ones(3, np.int64))) == {"gauc_users", "samples"}


def tokens(weights=None):
    codes = np.array([[0, 0], [0, 4], [3, PAD], [0, 4]], np.int32)
    return ItemTokens.of(codes, SLOTS, weights)


@pytest.mark.parametrize("items", ["concat", "sum"])
def test_items_are_their_tokens_scaled_by_the_tokenizers_weights(items):
    weights = np.array([[1, 0.5], [1, 2.0], [1, 0], [1, 0.25]], np.float32)
    vectors = ItemVectors(config.Ranking(items=items, width=6), tokens(weights))
    table, rows = vectors.table.weight, vectors.rows
    for item in range(4):
        parts = [table[rows[item, slot]] * float(weights[item, slot]) for slot in range(2)]
        expected = torch.cat(parts) if items == "concat" else parts[0] + parts[1]
        torch.testing.assert_close(vectors(torch.tensor(item)), expected)
    assert vectors.width == 6


def test_a_gate_starts_near_one_and_stays_within_two():
    torch.manual_seed(0)
    gate = Gate(8, 16, 4)
    assert gate(torch.zeros(1, 8)).mean().item() == pytest.approx(1.0, abs=0.15)
    values = gate(100 * torch.randn(500, 8))
    assert values.min() >= 0
    assert values.max() <= 2


def test_items_of_one_sid_have_one_logit_and_the_history_counts():
    torch.manual_seed(0)
    model = PPNet(config.Ranking(width=8, hidden=(16,)), tokens(), 3).eval()
    for table in (model.items.table, model.prior_items.table, model.users):
        torch.nn.init.normal_(table.weight)
    user, past = torch.zeros(4, dtype=torch.int64), torch.tensor([[0, 2, -1]] * 4)
    logits = model(user, past, torch.arange(4))
    assert logits[1] == logits[3]
    assert len(set(logits.tolist())) == 3
    assert model(user, torch.full((4, 1), -1), torch.arange(4))[0] != logits[0]
    two = torch.tensor([[0, 2, -1], [3, -1, -1]])
    torch.testing.assert_close(
        model(user, two, torch.arange(4)),
        model(user, two[[0, 0, 1, 1]], torch.arange(4)),
        msg="a history of two samples each",
    )


def test_features_reach_the_gates_without_gradient():
    model = PPNet(config.Ranking(width=8, hidden=(16,)), tokens(), 3)
    with torch.no_grad():
        model.layers[0].weight.zero_()  # the only other way from the features to the logit
        model.layers[0].bias.fill_(1.0)
    model(torch.tensor([0]), torch.tensor([[1]]), torch.tensor([2])).sum().backward()
    assert model.items.table.weight.grad.abs().sum() == 0
    assert model.prior_items.table.weight.grad.abs().sum() > 0


def test_more_users_than_rows_share_them_by_fnv_1a():
    expected = []
    for user in (0, 1, 299, 2**33 + 5):
        number = 0xCBF29CE484222325
        for byte in user.to_bytes(8, "little"):
            number = (number ^ byte) * 0x100000001B3 % 2**64
        expected.append(((number >> 32) ^ number) % 2**32 % 97)
    assert hashed_index(torch.tensor([0, 1, 299, 2**33 + 5]), 97).tolist() == expected
    spread = torch.bincount(hashed_index(torch.arange(97_000), 97))
    assert spread.min() > 850 and spread.max() < 1150
    few = PPNet(config.Ranking(width=8, hidden=(16,), user_rows=97), tokens(), 300)
    assert few.users.num_embeddings == 97
    few(torch.tensor([299]), torch.tensor([[1]]), torch.tensor([2])).sum().backward()
    assert few.users.weight.grad.coalesce().indices().tolist() == [[expected[2]]]


def test_only_the_rows_of_the_batch_change_and_decay(tmp_path):
    made = training(tmp_path, events(), weight_decay=0.5)
    tables = [made.model.users.weight]
    assert [id(table) for table in made.model.sparse_tables()] == [id(table) for table in tables]
    before = [table.detach().clone() for table in tables]
    batch, labels = made._batch(np.array([4, 29]), np.array([[7, 8], [9, 10]]))
    loss = torch.nn.functional.binary_cross_entropy_with_logits(made.model(*batch), labels)
    plain = torch.autograd.grad(loss, tables[0], retain_graph=True)[0].to_dense()
    made._clock = 0.0
    made.step(loss, 1, 0)
    for table, old in zip(tables, before):
        assert (table != old).any(1).nonzero().flatten().tolist() == [0, 2]
        assert table.grad.is_sparse
    torch.testing.assert_close(tables[0].grad.to_dense()[[0, 2]], plain[[0, 2]] + 0.5 * before[0][[0, 2]])
    state = made.optimizers["table"].state[tables[0]]["sum"]
    assert state.any(1).nonzero().flatten().tolist() == [0, 2]


def test_large_tables_of_items_have_sparse_gradients_of_the_same_values(monkeypatch):
    gradients = []
    for rows in (1 << 17, 1):
        monkeypatch.setattr(ppnet, "_SPARSE", rows)
        torch.manual_seed(0)
        catalogue = tokens().with_ngrams([(0, 1)], 8)
        vectors = ItemVectors(config.Ranking(width=6), catalogue)
        vectors(torch.tensor([[0, 1], [1, 3]])).pow(2).sum().backward()
        assert len(vectors.sparse_tables()) == (2 if rows == 1 else 0)
        found = [vectors.table.weight.grad, vectors.ngrams.grad]
        assert all(gradient.is_sparse == (rows == 1) for gradient in found)
        gradients.append([gradient.to_dense() if gradient.is_sparse else gradient for gradient in found])
    for dense, sparse in zip(*gradients):
        torch.testing.assert_close(dense, sparse)


def events(labels=False, users=300, seed=0):
    """Users of two kinds; a user of kind k clicks items of kind k nine times of ten. With ``labels`` all items are
    shown, and rated so."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 2, users)
    liked = rng.random((users, 12)) < 0.9
    item_kind = (
        np.where(rng.random((users, 12)) < 0.5, kind[:, None], 1 - kind[:, None])
        if labels
        else np.where(liked, kind[:, None], 1 - kind[:, None])
    )
    items = 2 * rng.integers(0, 20, (users, 12)) + item_kind
    label = ((item_kind == kind[:, None]) == liked).astype(int) if labels else np.ones_like(items)
    split = np.where(np.arange(12) == 11, "test", np.where(np.arange(12) == 10, "validation", "train"))
    table = pa.table(
        {
            "user_index": np.repeat(np.arange(users), 12),
            "position": np.tile(np.arange(12), users),
            "item_index": items.reshape(-1),
            "label": pa.array(label.reshape(-1), pa.int32()),
            "in_history": np.ones(items.size, bool),
            "split": np.tile(split, users),
        }
    )
    return table.take(rng.permutation(len(table)))


class Alone(Workers):
    """One of several workers, who does not wait for the others."""

    def gather(self, rows):
        return rows

    def sum(self, tensor):
        return tensor.clone()


def read(table, workers=Workers()):
    """The events of a worker: those of every world-th user."""
    mine = table.filter(table["user_index"].to_numpy() % workers.world == workers.rank)
    return read_events(lambda columns: mine.select(columns).to_batches(max_chunksize=101))


def training(folder, table, epochs=6, workers=Workers(), **settings):
    found, whole = read(table, workers), read(table)
    codes = np.stack([np.arange(40) // 10, np.arange(40) % 2], axis=1).astype(np.int32)
    counts = np.bincount(whole.items[whole.splits == 0], minlength=40)
    chosen = config.Ranking.model_validate(
        {"width": 8, "hidden": [32], "batch": 512, "lr": 0.01, "epochs": epochs, "dropout": 0.0, **settings}
    )
    return RankingTraining(
        chosen,
        ItemTokens.of(codes, SLOTS),
        RankingData(found, counts, np.arange(40) // 20, "ranking_samples version 0"),
        Path(folder),
        3,
        workers,
    )


def test_histories_hold_what_came_before():
    table = events()
    found = read(table)
    assert [SPLITS[s] for s in found.splits[9:13]] == ["train", "validation", "test", "train"]
    mine = pc.and_(pc.equal(table["split"], "train"), pc.equal(table["position"], 9))
    other = table.set_column(5, "split", pc.if_else(mine, RANKING_ONLY, table["split"]))
    np.testing.assert_array_equal(read(other).splits, found.splits)
    event = 5 * 12 + 4
    assert found.histories(np.array([event, event - 4]), 3).tolist() == [
        found.items[event - 3 : event].tolist(),
        [-1, -1, -1],
    ]


def test_impressions_and_unrated_events(tmp_path):
    """An impression is a sample and in no history; an event without a label is in histories and no sample."""
    rows = {"position": range(6), "item_index": [10, 11, 12, 13, 14, 15], "label": [1, 0, None, 1, 0, 1]}
    seen = {
        "in_history": [True, False, True, True, False, True],
        "split": ["train"] * 3 + ["ranking", "validation", "test"],
        "time": pa.array(range(6), pa.timestamp("us", tz="UTC")),
    }
    found = read(pa.table({"user_index": [0] * 6, **rows, **seen}))
    assert [found.histories(np.array([e]), 2).tolist()[0] for e in range(6)] == [
        [-1],
        [10],
        [10],
        [10, 12],
        [12, 13],
        [12, 13],
    ]
    chosen = config.Ranking(width=8, hidden=(16,))
    catalogue = ItemTokens.of(np.zeros((40, 2), np.int32), SLOTS)
    data = RankingData(found, np.ones(40, np.int64), np.zeros(40, np.int64), "v")
    made = RankingTraining(chosen, catalogue, data, tmp_path, 3, Workers())
    assert [made.parts[split].tolist() for split in SPLITS] == [[1, 3], [4], [5]]


def test_no_event_of_a_slate_is_in_the_history_of_another():
    """Impressions carry the time of their slate, and what was clicked there would say which were not."""
    label, time = [1, 1, 0, 1, 0, 1, 1, 1], [1, 2, 2, 2, 2, 3, 4, 4]
    rows = {"user_index": [0] * 8, "position": range(8), "item_index": range(10, 18), "label": label}
    seen = {"in_history": [value == 1 for value in label], "split": ["train"] * 8}
    table = pa.table({**rows, **seen, "time": pa.array(time, pa.timestamp("us", tz="UTC"))})
    last = read(table).histories(np.arange(8), 2).tolist()
    assert last == [[-1, -1], *[[10, -1]] * 4, [11, 13], [13, 15], [15, 16]]
    untimed = table.set_column(6, "time", pa.nulls(8, pa.timestamp("us", tz="UTC")))
    assert read(untimed).histories(np.arange(8), 2).tolist()[4] == [11, 13], "pos says the order"


def test_the_users_of_validation_are_at_most_so_many(tmp_path):
    found = training(tmp_path, events(), 1, eval_users=50)
    assert len(found.parts["validation"]) == 50 and len(found.parts["test"]) == 300
    chosen = Sample(50, Workers()).chosen(np.arange(300))
    assert found.events.ids[found.events.users[found.parts["validation"]]].tolist() == np.flatnonzero(chosen).tolist()


@pytest.mark.parametrize("labels", [False, True])
def test_it_learns_who_clicks_what(labels, tmp_path):
    result = training(tmp_path, events(labels), 20, patience=20).run()
    assert result["labels"] == ("ratings" if labels else "sampled")
    assert result["test"]["auc"] > (0.8 if labels else 0.65)  # drawn items are of the user's kind half of the time
    assert set(result["strata"]) == {"all", "head", "mid"}


def test_a_batch_is_event_by_event_with_its_history(tmp_path):
    made = training(tmp_path, events())
    chosen, drawn = np.array([4, 29]), np.array([[7, 8], [9, 10]])
    (users, histories, items), labels = made._batch(chosen, drawn)
    own = made.events.items[chosen]
    assert (
        users.tolist() == [0, 0, 0, 2, 2, 2]
        and items.tolist() == [own[0], 7, 8, own[1], 9, 10]
        and labels.tolist() == [1, 0, 0] * 2
    )
    assert histories.tolist() == [[*made.events.items[:4].tolist(), -1], made.events.items[24:29].tolist()]


def test_drawn_items_do_not_depend_on_the_seed_or_the_worker(tmp_path):
    table = events()
    whole = training(tmp_path / "a", table)
    every = whole._negatives(whole.parts["test"].astype(np.int64))
    assert every.shape == (300, 4) and (every < 40).all()
    for rank in range(3):
        part = training(tmp_path / str(rank), table, workers=Alone(rank, 3))
        mine = part._negatives(part.parts["test"].astype(np.int64))
        np.testing.assert_array_equal(mine, every[rank::3])
    own = whole.events.items[whole.parts["test"].astype(np.int64)]
    assert not (every == own[:, None]).any(), "an event's item is no negative of it"
    share, popularity = np.bincount(every.ravel(), minlength=40) / every.size, np.diff(whole.cdf, prepend=0)
    others = np.tile(popularity, (len(own), 1))
    others[np.arange(len(own)), own] = 0
    expected = (others / others.sum(1, keepdims=True)).mean(0)
    assert np.abs(share - expected).max() < 4 * np.sqrt(expected.max() / every.size)


def test_negatives_at_the_ends_of_the_catalogue_are_other_items(tmp_path):
    made = training(tmp_path, events())
    made.cdf = np.cumsum([0, 0.5, 0, 0.5 - 1e-12, 1e-12, 0])
    uniform = np.array([[0.0, 0.5, np.nextafter(1, 0)]] * 6)
    drawn = made._draw(uniform, np.arange(6, dtype=np.int32))
    assert np.isin(drawn, [1, 3, 4]).all() and not (drawn == np.arange(6)[:, None]).any()
    alone = events()
    alone = alone.set_column(2, "item_index", pa.array(np.zeros(len(alone), np.int64)))
    with pytest.raises(InputError, match=r"training events of 1 item alone: no other item can be drawn"):
        training(tmp_path / "alone", alone).run()


def test_numbers_of_an_event_are_uniform():
    found = read(events(users=2000))
    drawn = found.uniform(np.arange(len(found)), 4)
    assert drawn.min() >= 0 and drawn.max() < 1
    counts = np.histogram(drawn, 50, (0, 1))[0]
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 90, "chi-square of 49 degrees of freedom"
    assert np.abs(np.corrcoef(np.column_stack([drawn, np.roll(drawn, 1, 0)]).T) - np.eye(8)).max() < 0.03


def test_a_killed_training_ends_as_it_would_have(tmp_path):
    whole = training(tmp_path / "whole", events(), 3).run()

    def kill(rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training(tmp_path / "cut", events(), 3).run(kill)
    rest = training(tmp_path / "cut", events(), 3).run()
    assert [rest[key] for key in ("best_epoch", "test", "strata")] == [
        whole[key] for key in ("best_epoch", "test", "strata")
    ]


def test_an_epoch_that_was_cut_off_does_not_replace_the_best_one(tmp_path, monkeypatch):
    """Another number of workers may find, after it resumes, that this epoch is not the best."""
    first, save = training(tmp_path, events(), 2), RankingTraining._save
    aucs = iter([0.5, 0.6])
    monkeypatch.setattr(RankingTraining, "validate", lambda self: {"auc": next(aucs)})

    def killed(self, number, rows):
        if number == 2:
            raise KeyboardInterrupt
        save(self, number, rows)

    monkeypatch.setattr(RankingTraining, "_save", killed)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    assert first.weights(1).exists() and first.weights(2).exists()
    monkeypatch.setattr(RankingTraining, "_save", save)
    aucs, other = iter([0.4]), training(tmp_path, events(), 2)
    assert other.run()["best_epoch"] == 1
    saved = load_file(other.weights(1))
    assert all(torch.equal(tensor, saved[name]) for name, tensor in other.model.state_dict().items())


def test_ratings_are_asked_for_where_there_are_none(tmp_path):
    with pytest.raises(
        InputError, match=r"ranking\.labels is 'ratings' but ranking_samples version 0 has no negative event"
    ):
        training(tmp_path, events(), labels="ratings")


def test_scores_of_many_samples_are_left_in_shards_for_others_to_measure(tmp_path):
    whole = training(tmp_path / "whole", events(labels=True), 2).run()
    shards = training(tmp_path / "shards", events(labels=True), 2)
    shards.shards_from = int(whole["strata"]["all"]["samples"])
    found = shards.run()
    assert {"test", "strata"}.isdisjoint(found)
    assert found["scores"] == ["0-of-1.parquet"]
    rows = pq.read_table(tmp_path / "shards" / "scores" / "0-of-1.parquet")
    assert rows.schema.equals(RANKING_SCORES)
    for name, expected in whole["strata"].items():
        part = rows if name == "all" else rows.filter(pc.equal(rows["stratum"], name))
        users, labels, scores = (part[column].to_numpy() for column in ("user", "label", "score"))
        assert ranking_metrics(users, scores, labels.astype(np.int64), 200, 3) == expected


def test_a_split_of_one_class_is_named(tmp_path):
    table = events(labels=True)
    held_out = pc.equal(table["split"], "validation")
    table = table.set_column(3, "label", pc.if_else(held_out, pa.scalar(1, pa.int32()), table["label"]))
    with pytest.raises(
        InputError, match=r"split 'validation' of ranking_samples version 0 has 300 positive and 0 negative samples"
    ):
        training(tmp_path, table).run()


def test_ratings_without_a_user_of_both_classes_leave_gauc_out(tmp_path):
    found = training(tmp_path, events(labels=True), 2).run()  # one test event a user
    assert set(found["test"]) == {"auc"}
    assert found["strata"]["all"]["gauc_users"] == 0
