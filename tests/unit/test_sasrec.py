import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from adasid import config
from adasid.data.sequences import Histories, epoch_users, log_q
from adasid.distributed import Workers
from adasid.errors import InputError, TrainingError
from adasid.metrics.longtail import spearman
from adasid.recommenders.sasrec import SASRec, sampled_softmax
from adasid.training import behavior, checkpoint
from adasid.training.behavior import BehaviorData, BehaviorTraining
from adasid.training.checkpoint import read_rows, write_rows
from adasid.training.item_table import ItemTable
from adasid.training.loop import best


def histories(rows, targets=None):
    table = pa.table(
        {
            "user_index": np.arange(len(rows)),
            "history": pa.array(rows, pa.list_(pa.int64())),
            "target": pa.array(targets or [None] * len(rows), pa.int64()),
        }
    )
    return Histories.from_batches(table.to_batches(max_chunksize=3))


def data(users=120, items=40, seed=0):
    """Users walk round a ring of items: the next item is the one after."""
    rng = np.random.default_rng(seed)
    start = (rng.integers(items, size=users) * rng.random(users)).astype(int)
    walks = [[int((s + step) % items) for step in range(8)] for s in start]
    counts = np.bincount(np.concatenate([w[:6] for w in walks]), minlength=items + 1)
    train, validation, test = (
        histories([w[:6] for w in walks]),
        histories([w[:6] for w in walks], [w[6] for w in walks]),
        histories([w[:7] for w in walks], [w[7] for w in walks]),
    )
    return BehaviorData(train, validation, test, counts, "sequences version 0")


SMALL = config.Behavior(
    width=16, blocks=1, epochs=6, batch_users=32, negatives=64, max_length=6, dropout=0.1, patience=6
)


def test_histories_batches_are_cut_and_padded():
    h = histories([[1, 2, 3, 4], [5], [6, 7]], [9, 8, 7])
    assert h.last(np.array([0, 1, 2]), 3).tolist() == [[2, 3, 4], [5, -1, -1], [6, 7, -1]]
    part = h.part(1, 2)
    assert part.last(np.array([0]), 3).tolist() == [[5]]
    assert part.targets.tolist() == [8]
    assert len(Histories.from_batches([])) == 0


def test_negatives_are_as_likely_as_they_are_drawn():
    h = histories([[1, 2, 3, 4], [5], [6, 4, 7]])
    visited, targets = h.counts(9, 2)  # what a model of two events trains on: 2, 3, 4; 5; 6, 4, 7
    assert visited.tolist() == [item in range(2, 8) for item in range(9)]
    assert targets.tolist() == [0, 0, 0, 1, 2, 0, 0, 1, 0]
    longer = h.counts(9, 3)
    assert longer[0].tolist() == [item in range(1, 8) for item in range(9)]
    assert longer[1].tolist() == [0, 0, 1, 1, 2, 0, 0, 1, 0]
    share = log_q(targets, 3, Workers(), torch.device("cpu")).exp()
    assert share.tolist() == pytest.approx([0.25, 0.25, 0.25, 0.25, 0.5, 0.25, 0.25, 0.25, 0.25])
    assert log_q(torch.zeros(9), 0, Workers(), torch.device("cpu")).isfinite().all()


def drawn(training, length, batch_users, epochs=30):
    """The share of each item among the targets of all workers' batches."""
    data, workers, device = training.data, training.workers, torch.device("cpu")
    counts = torch.zeros(len(training.log_q), dtype=torch.int64)
    for epoch in range(epochs):
        for users in epoch_users(data.train, batch_users, training.seed, epoch, workers, device):
            targets = torch.from_numpy(data.train.last(users, length + 1)[:, 1:])
            counts += torch.bincount(targets[targets >= 0], minlength=len(counts))
    counts = workers.sum(counts)
    return counts / counts.sum()


def is_drawn(training, length, batch_users):
    """Whether ``log_q`` is the logarithm of the share of each item that is drawn."""
    share = drawn(training, length, batch_users)
    return torch.allclose(training.log_q.exp()[share > 0], share[share > 0], rtol=0.15, atol=0.002)


def test_logq_is_that_of_the_negatives_that_training_draws(tmp_path):
    short = SMALL.model_copy(update={"max_length": 3})
    training = BehaviorTraining(short, data(), tmp_path, 1, Workers())
    assert is_drawn(training, 3, SMALL.batch_users)
    training.log_q = BehaviorTraining(SMALL, data(), tmp_path, 1, Workers()).log_q
    assert not is_drawn(training, 3, SMALL.batch_users)


def test_sampled_softmax_over_all_items_with_uniform_q_is_the_full_softmax():
    torch.manual_seed(0)
    states, table, target = torch.randn(6, 4), torch.randn(9, 4), torch.randint(9, (6,))
    same = target[:, None] == torch.arange(9)[None]
    sampled = sampled_softmax(states, table[target], table, torch.full((6,), -2.0), torch.full((9,), -2.0), same)
    full = torch.nn.functional.cross_entropy(states @ table.T, target)
    assert sampled.item() == pytest.approx(full.item(), rel=1e-5)


def test_logq_correction_makes_the_expected_loss_gradient_unbiased_towards_rare_items():
    states, positives, negatives = torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2)
    loss = sampled_softmax(
        states, positives, negatives, torch.tensor([-5.0]), torch.tensor([-1.0]), torch.zeros(1, 1, dtype=torch.bool)
    )
    assert loss.item() == pytest.approx(float(np.log1p(np.exp(1.0 - 5.0))), rel=1e-5)


def test_states_are_causal():
    torch.manual_seed(0)
    model = SASRec(8, 2, 2, 5, 0.0).eval()
    rows = torch.randn(1, 5, 8)
    changed = rows.clone()
    changed[0, 3:] += 1
    assert torch.allclose(model(rows)[0, :3], model(changed)[0, :3], atol=1e-6)


def test_it_learns_the_walk_updates_only_seen_rows_and_reports_the_norm(tmp_path):
    d = data()
    training = BehaviorTraining(SMALL, d, tmp_path, 1, Workers())
    unseen = training.table.rows[-1].clone()
    rows = []
    result = training.run(lambda all_rows: rows.append(all_rows[-1]))
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert result.summary["test"]["recall@5"] > 0.5
    assert torch.equal(result.embeddings[-1], unseen), "Adagrad must not touch a row that is in no batch"
    assert result.learned.tolist() == (d.counts > 0).tolist()
    assert result.summary["best_epoch"] == max(rows, key=lambda r: r["validation_ndcg@10"])["epoch"]
    assert result.embeddings.shape == (41, 16)


def test_an_item_that_no_event_trains_has_no_embedding(tmp_path):
    d = data()
    walks = d.train.items.reshape(-1, 6)
    d.train = histories([[40, *row] if user == 0 else [*row] for user, row in enumerate([*walks[:1], *walks])])
    d.counts[40] = 1  # one event, before the latest seven of its user
    long = BehaviorTraining(SMALL, d, tmp_path / "long", 1, Workers()).run()
    cut = BehaviorTraining(SMALL.model_copy(update={"max_length": 5}), d, tmp_path / "cut", 1, Workers()).run()
    assert long.learned[40] and not cut.learned[40]
    cut.write(tmp_path / "shard.parquet")
    written = pq.read_table(tmp_path / "shard.parquet")
    assert written["item_index"].to_pylist() == torch.nonzero(cut.learned).flatten().tolist()
    assert written["embedding"].to_pylist() == cut.embeddings[cut.learned].tolist()


def test_a_killed_run_resumes_and_ends_as_it_would_have(tmp_path):
    d = data()
    whole = BehaviorTraining(SMALL, d, tmp_path / "a", 1, Workers()).run()

    class Killed(Exception):
        pass

    def kill(rows):
        if len(rows) == 3:
            raise Killed

    with pytest.raises(Killed):
        BehaviorTraining(SMALL, d, tmp_path / "b", 1, Workers()).run(kill)
    seen = []
    resumed = BehaviorTraining(SMALL, d, tmp_path / "b", 1, Workers()).run(lambda rows: seen.append(len(rows)))
    assert seen[0] == 4
    assert torch.equal(whole.embeddings, resumed.embeddings)
    assert torch.equal(whole.norms, resumed.norms)


def test_a_step_of_row_wise_adagrad_is_that_computed_by_hand():
    table = ItemTable(5, 2, 0, 0.1, Workers())
    before = table.rows.clone()
    assert before.std() == pytest.approx(0.02, rel=0.8)
    _, request = table.fetch(torch.tensor([3, 1]))
    table.update(request, torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
    assert table.squares.tolist() == [0, 2, 0, 12.5, 0]  # the mean of the squares
    table.update(request, torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert table.squares.tolist() == [0, 2, 0, 13, 0]
    moved = torch.zeros(5, 2)
    moved[3] = torch.tensor([3.0 / 12.5**0.5 + 1.0 / 13**0.5, 4.0 / 12.5**0.5])
    moved[1, 1] = 2.0 / 2**0.5
    torch.testing.assert_close(table.rows, before - 0.1 * moved)


@pytest.mark.parametrize(("written", "read"), [(1, 3), (3, 1), (2, 3), (3, 3)])
def test_rows_are_read_by_any_number_of_workers(written, read, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_ROWS", 3)
    whole = torch.arange(22.0).view(11, 2)
    for rank in range(written):
        write_rows(tmp_path, {"table": whole[rank::written], "norm": whole[rank::written, 0]}, Workers(rank, written))
    for rank in range(read):
        rows = read_rows(tmp_path, Workers(rank, read))
        assert torch.equal(rows["table"], whole[rank::read]) and torch.equal(rows["norm"], whole[rank::read, 0])
        there = {"table": torch.zeros(len(whole[rank::read]), 2)}
        checkpoint.restore_rows(tmp_path, there, Workers(rank, read))
        assert torch.equal(there["table"], whole[rank::read])
    with pytest.raises(FileNotFoundError):
        read_rows(tmp_path / "none", Workers())


def test_early_stopping_and_non_finite_loss(tmp_path):
    stopped = BehaviorTraining(
        SMALL.model_copy(update={"patience": 1, "epochs": 40}), data(users=20), tmp_path / "a", 1, Workers()
    )
    rows = []
    stopped.run(lambda r: rows.append(r[-1]))
    assert len(rows) < 40
    broken = BehaviorTraining(SMALL, data(), tmp_path / "b", 1, Workers())
    broken.table.rows.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"not finite at epoch 1, step 0.*sequences version 0"):
        broken.run()


def test_without_validation_nothing_is_chosen_and_the_last_epoch_is_taken(tmp_path):
    d = data()
    d.validation = d.test = Histories.from_batches([])
    run = BehaviorTraining(SMALL.model_copy(update={"patience": 1}), d, tmp_path, 1, Workers())
    rows, last = [], torch.empty(0)

    def report(all_rows):
        nonlocal last
        rows.append(all_rows[-1])
        last = run.table.rows.clone()

    result = run.run(report)
    assert len(rows) == 6 and not [name for name in rows[-1] if name.startswith(("validation", "test"))]
    assert result.summary["best_epoch"] == 6 and result.summary["validation"] == result.summary["test"] == {}
    assert result.summary["note"].startswith("behaviour: validation_ndcg@10 is defined for no epoch")
    assert torch.equal(result.embeddings, last)


def test_a_correlation_that_is_not_defined_chooses_nothing(tmp_path):
    d = data()
    d.counts = (d.counts > 0).astype(np.int64)  # of equal counts there is no rank correlation
    result = BehaviorTraining(SMALL.model_copy(update={"early_epochs": 3}), d, tmp_path, 1, Workers()).run()
    assert result.summary["spearman"] is None and result.summary["early_epoch"] == 3


def test_no_user_to_train_on_is_named(tmp_path):
    d = data()
    d.train = Histories.from_batches([])
    with pytest.raises(InputError, match="behaviour: sequences version 0 has no user to train on"):
        BehaviorTraining(SMALL, d, tmp_path, 1, Workers()).run()


def test_the_best_row_is_the_first_of_the_highest_that_are_numbers():
    assert best([{"a": float("nan")}, {"a": 1.0}, {"a": 1.0}, {}], "a") == 1
    assert best([{"a": float("nan")}, {}], "a") is None is best([], "a")
    assert best([{"a": 0.0}, {"a": -1.0}], "a") == 0


def test_the_correlation_of_many_items_is_that_of_every_nth(tmp_path, monkeypatch):
    training = BehaviorTraining(SMALL, data(), tmp_path, 0, Workers())
    norms, counts, learned = training.table.rows.norm(dim=1).numpy(), training.data.counts, training.learned.numpy()
    assert training._spearman() == pytest.approx(spearman(norms[learned], counts[learned].astype(float)))
    monkeypatch.setattr(behavior, "_SPEARMAN_SAMPLE", len(counts) // 3)
    every = -(-len(counts) // (len(counts) // 3))
    some = np.arange(0, len(counts), every)[learned[::every]]
    assert training._spearman() == pytest.approx(spearman(norms[some], counts[some].astype(float)))
