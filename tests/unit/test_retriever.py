"""Test retrieval through semantic IDs: token tables, prefixes, the three heads against brute force, and training on
sequences with a known rule."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from safetensors.torch import load_file

from adasid import config
from adasid.data.sequences import Histories
from adasid.distributed import Workers
from adasid.errors import InputError
from adasid.metrics import blocks
from adasid.metrics.retrieval import recall_ndcg, target_ranks
from adasid.recommenders import heads, retriever
from adasid.recommenders.tokens import ItemTokens, Prefixes
from adasid.sid import Slot
from adasid.tables import BEHAVIOR, PAD
from adasid.training.average import MovingAverage
from adasid.training.retrieval import RetrievalData, RetrievalTraining, by_stratum

SLOTS = (Slot("t0", "text", 4), Slot("t1", "text", 3), Slot("b0", BEHAVIOR, 5))


def codes_of(items, seed=0):
    """Codes with PAD and with items that share a SID."""
    rng = np.random.default_rng(seed)
    codes = np.stack([rng.integers(0, slot.size, items) for slot in SLOTS], axis=1).astype(np.int32)
    codes[rng.random(codes.shape) < 0.1] = PAD
    codes[1] = codes[0]
    return codes


def model(head, items=60, **settings):
    torch.manual_seed(0)
    chosen = config.Retrieval.model_validate({"head": head, "width": 8, "max_length": 5}).model_copy(update=settings)
    made = heads.build(chosen, ItemTokens.of(codes_of(items), SLOTS))
    torch.nn.init.normal_(made.table)
    return made.eval()


def test_tokens_are_rows_of_one_table_and_pad_is_a_slots_last():
    tokens = ItemTokens.of(np.array([[0, 2, PAD], [3, PAD, 4], [0, 2, PAD]], np.int32), SLOTS)
    assert tokens.sizes == (5, 4, 6)
    assert tokens.rows.tolist() == [[0, 7, 14], [3, 8, 13], [0, 7, 14]]
    assert tokens.group[0] == tokens.group[2] != tokens.group[1]
    with pytest.raises(InputError, match="2 codes but the tokenizer has 3 slots"):
        ItemTokens.of(np.zeros((1, 2), np.int32), SLOTS)
    with pytest.raises(InputError, match=r"code 3 in slot .* but the tokenizer has 3 codes there"):
        ItemTokens.of(np.array([[0, 3, 0]], np.int32), SLOTS)


@pytest.mark.parametrize("size", [3, 2**31 - 2])
def test_groups_are_those_of_distinct_rows_also_where_codes_do_not_fit_into_one_integer(size):
    rng = np.random.default_rng(0)
    codes = rng.choice(np.array([PAD, 0, size - 1], np.int32), (300, 4))
    tokens = ItemTokens.of(codes, [Slot(str(slot), "text", size) for slot in range(4)])
    assert tokens.group.tolist() == np.unique(codes, axis=0, return_inverse=True)[1].reshape(-1).tolist()
    assert tokens.codes.tolist() == codes.tolist()


def test_loss_weights_have_mean_one_over_the_behaviour_tokens_and_are_clipped():
    codes = np.array([[0, 0, 0], [0, 0, 1], [0, 0, PAD], [0, 0, 2], [0, 0, 3], [0, 0, 4]], np.int32)
    weights = np.ones((6, 3), np.float32)
    weights[:, 2] = (0.1, 0.1, 9.0, 0.1, 0.1, 4.6)  # the one of a PAD does not count; mean of the others 1
    found = ItemTokens.of(codes, SLOTS, weights).loss_weights()
    torch.testing.assert_close(found[:, 2], torch.tensor([0.1, 0.1, 1.0, 0.1, 0.1, 3.0]))
    assert (found[:, :2] == 1).all()


@pytest.mark.parametrize("items", [1, 7, 60, 500])
def test_prefixes_are_those_of_the_catalogue(items):
    codes = codes_of(items) if items > 1 else np.zeros((1, 3), np.int32)
    tokens = ItemTokens.of(codes, SLOTS)
    local = (tokens.rows - torch.tensor(tokens.starts)).numpy()
    prefixes = Prefixes.of(tokens)
    lean = Prefixes.of_codes(codes, SLOTS)
    for ours, theirs in zip((*lean.token, *lean.first, lean.items), (*prefixes.token, *prefixes.first, prefixes.items)):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
    walked = {(): torch.zeros(1, dtype=torch.int64)}
    for level in range(3):
        deeper = {}
        for prefix, node in walked.items():
            _, children = prefixes.children(level, node)
            for child in children.tolist():
                deeper[(*prefix, int(prefixes.token[level][child]))] = torch.tensor([child])
        walked = deeper
        assert set(walked) == {tuple(row[: level + 1]) for row in local.tolist()}
    paths = prefixes.paths(torch.arange(items))
    assert [prefixes.token[level][paths[:, level]].tolist() for level in range(3)] == local.T.tolist()
    assert paths[:, 2].tolist() == [int(walked[tuple(row)]) for row in local.tolist()]
    for prefix, leaf in walked.items():
        _, members = prefixes.members(leaf)
        assert members.tolist() == np.flatnonzero((local == prefix).all(1)).tolist()


def test_item_scores_are_inner_products_with_the_sum_of_tokens():
    made = model("item")
    states = torch.randn(4, 8)
    vectors = torch.stack([made.table[row].sum(0) / 3**0.5 for row in made.catalogue.rows])
    torch.testing.assert_close(made.scores(states), states @ vectors.T)


def test_parallel_scores_are_sums_of_token_log_probabilities():
    made = model("parallel")
    torch.nn.init.normal_(made.heads)
    states, starts = torch.randn(4, 8), made.catalogue.starts
    expected = torch.zeros(4, 60)
    for slot, (start, size) in enumerate(zip(starts, made.catalogue.sizes)):
        own = states + nnf.silu(states @ made.heads[:, slot * 8 : slot * 8 + 8])
        log_p = (
            nnf.normalize(own, dim=1) @ nnf.normalize(made.table[start : start + size], dim=1).T / 0.07
        ).log_softmax(1)
        expected += log_p[:, made.catalogue.rows[:, slot] - start]
    torch.testing.assert_close(made.scores(states), expected)


@pytest.mark.parametrize("head", ["item", "parallel"])
def test_the_exact_list_is_the_sorted_catalogue(head, monkeypatch):
    monkeypatch.setattr(retriever, "CHUNK", 13)
    made = model(head)
    states = torch.randn(6, 8)
    items, scores = made.top(states, 20)
    whole = made.scores(states)
    order = torch.argsort(whole, dim=1, descending=True, stable=True)[:, :20]
    torch.testing.assert_close(scores, whole.gather(1, order))
    assert (items == order).float().mean() > 0.95  # equal scores at the end of a chunk may be cut otherwise
    assert made.ranks(states, items[:, 3])[0][0] == 4


SEEN = torch.tensor([[3, 7, -1, 20], [-1, -1, -1, -1], [0, 1, 59, -1]])


@pytest.mark.parametrize("head", ["item", "parallel", "autoregressive"])
def test_what_a_user_has_seen_leaves_the_list_and_takes_no_place_in_it(head, monkeypatch):
    monkeypatch.setattr(retriever, "CHUNK", 13)
    made = model(head, beam=200)
    states = torch.randn(3, 8)
    with torch.no_grad():
        whole, _ = made.top(states, 60)
        items, scores = made.top(states, 60, SEEN)
        for row, score, everything, seen in zip(items.tolist(), scores, whole.tolist(), SEEN.tolist()):
            expected = [item for item in everything if item not in seen]
            assert row == expected + [-1] * (60 - len(expected))
            assert torch.isfinite(score).sum() == len(expected)
        for place in (0, 11, 40):
            targets = items[:, place]
            ranks, everywhere = made.ranks(states, targets, 200, SEEN)
            assert ranks.tolist() == [place + 1] * 3
            assert everywhere.tolist() == [row.index(item) + 1 for row, item in zip(whole.tolist(), targets.tolist())]
        assert (made.ranks(states, torch.tensor([7, 5, 59]), 200, SEEN)[0] > 100).tolist() == [True, False, True]


def test_what_a_user_has_seen_takes_no_place_of_the_beam():
    made = model("autoregressive", beam=10)
    states = torch.randn(4, 8)
    with torch.no_grad():
        seen, _ = made.top(states, 10)
        items, _ = made.top(states, 10, seen)
        assert ((items >= 0).sum(1) >= 8).all()
        assert not (items[:, :, None] == seen.masked_fill(seen < 0, -2)[:, None, :]).any()
        assert (made.ranks(states, items[:, 0], 10, seen)[0] == 1).all()


def sequence_log_p(made, state, tokens):
    """Log-probability of a whole SID, slot after slot."""
    total = 0.0
    for slot, start in enumerate(made.catalogue.starts):
        out = made._decoded(state[None], tokens[None, :slot])[0, -1]
        words = nnf.normalize(made.table[start : start + made.catalogue.sizes[slot]], dim=1)
        total += (words @ out / 0.07).log_softmax(0)[tokens[slot] - start]
    return total


def test_a_wide_beam_is_exact_and_never_leaves_the_catalogue():
    made = model("autoregressive", beam=200)
    states = torch.randn(3, 8)
    with torch.no_grad():
        items, scores = made.top(states, 60)
        for state, row, score in zip(states, items, scores):
            expected = torch.stack([sequence_log_p(made, state, made.catalogue.rows[item]) for item in range(60)])
            assert sorted(row.tolist()) == list(range(60))
            torch.testing.assert_close(score, expected[row], rtol=1e-4, atol=1e-4)
            assert (score[:-1] >= score[1:] - 1e-5).all()
            assert row.tolist().index(1) == row.tolist().index(0) + 1  # they share a SID
        assert (made.ranks(states, items[:, 7], 200)[0] == 8).all()


def test_a_narrow_beam_gives_items_of_the_catalogue_and_says_where_it_ends():
    made = model("autoregressive", beam=2)
    items, scores = made.top(torch.randn(5, 8), 10)
    assert items.shape == scores.shape == (5, 10)
    assert ((items >= 0) == torch.isfinite(scores)).all()
    known = {tuple(row) for row in made.catalogue.rows.tolist()}
    sids = {tuple(made.catalogue.rows[item].tolist()) for item in items[items >= 0].tolist()}
    assert sids <= known
    assert all(len({tuple(made.catalogue.rows[i].tolist()) for i in row[row >= 0].tolist()}) == 2 for row in items)


def test_autoregressive_loss_is_the_mean_of_the_tokens_cross_entropies():
    made = model("autoregressive")
    states, targets = torch.randn(5, 8), torch.tensor([0, 3, 9, 20, 59])
    log_p = torch.stack([sequence_log_p(made, s, made.catalogue.rows[t]) for s, t in zip(states, targets)])
    torch.testing.assert_close(made.loss(states, targets, targets, torch.zeros(60)), -log_p.mean() / 3)


@pytest.mark.parametrize("order", ["slots", "behavior"])
def test_probabilities_among_valid_continuations_are_those_of_a_distribution_over_the_sids(order):
    made = model("autoregressive", continuations="valid", order=order, beam=200)
    assert made.catalogue.sizes == ((6, 5, 4) if order == "behavior" else (5, 4, 6))
    states, group = torch.randn(3, 8), made.catalogue.group
    with torch.no_grad():
        items, scores = made.top(states, 60)
        of_sid = torch.full((3, 60), -torch.inf).scatter_(
            1, group[items], scores
        )  # items that share a SID have one score
        torch.testing.assert_close(of_sid.logsumexp(1), torch.zeros(3), atol=1e-5, rtol=0)
        own = scores.gather(1, (items == torch.tensor([[3], [20], [59]])).int().argmax(1, keepdim=True))
        torch.testing.assert_close(made.loss(states, torch.tensor([3, 20, 59]), items[0], states), -own.mean() / 3)


def test_a_token_that_alone_continues_its_prefix_costs_nothing():
    made = model("autoregressive", continuations="valid")
    alone = torch.tensor(
        [row for row in range(60) if (made.catalogue.rows[:, :2] == made.catalogue.rows[row, :2]).all(1).sum() == 1]
    )
    logits = made._valid(torch.randn(len(alone), 6), 2, made.prefixes.paths(alone)[:, 1])
    assert len(alone) and (logits.softmax(1).max(1).values == 1).all()


def test_behaviour_may_be_decoded_first():
    other = ItemTokens.of(codes_of(60), SLOTS)
    tokens = ItemTokens.of(codes_of(60), SLOTS, np.arange(180, dtype=np.float32).reshape(60, 3)).behavior_first()
    assert tokens.sizes == (6, 5, 4) and tokens.behavior == (0,)
    local = other.rows - torch.tensor(other.starts)
    torch.testing.assert_close(tokens.rows - torch.tensor(tokens.starts), local[:, [2, 0, 1]])
    assert tokens.weights[1].tolist() == [5, 3, 4] and (tokens.group == other.group).all()


def chains(users=400, items=40, seed=0):
    """Item i is followed by 7 i + 3 modulo the catalogue, nine times of ten."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, items, users)]
    for _ in range(7):
        rows.append(np.where(rng.random(users) < 0.9, (7 * rows[-1] + 3) % items, rng.integers(0, items, users)))
    table = np.stack(rows, axis=1)

    def cut(last, held_out):
        target = table[:, last] if held_out else np.full(users, -1)
        return Histories(
            table[:, :last].reshape(-1).astype(np.int64),
            np.arange(0, users * last + 1, last).astype(np.int64),
            target.astype(np.int64),
        )

    return RetrievalData(cut(6, False), cut(6, True), cut(7, True), np.arange(items) * 3 // items, "test")


def training(head, folder, epochs, workers=Workers(), users=400, **settings):
    codes = np.stack([np.arange(40) // 8, np.arange(40) % 8, np.arange(40) % 5], axis=1).astype(np.int32)
    slots = (Slot("a", "text", 5), Slot("b", "text", 8), Slot("c", BEHAVIOR, 5))
    chosen = {
        "head": head,
        "width": 32,
        "max_length": 6,
        "dropout": 0.0,
        "epochs": epochs,
        "batch_users": 64,
        "negatives": 64,
        "lr": 0.003,
        "validation_beam": 10,
    }
    data = chains(users)
    data.train, data.validation, data.test = (
        h.part(workers.rank, workers.world) for h in (data.train, data.validation, data.test)
    )
    return RetrievalTraining(
        config.Retrieval.model_validate(chosen | settings), ItemTokens.of(codes, slots), data, Path(folder), 3, workers
    )


@pytest.mark.parametrize(
    ("head", "settings"),
    [
        ("item", {}),
        ("parallel", {}),
        ("autoregressive", {}),
        ("autoregressive", {"continuations": "valid", "order": "behavior"}),
    ],
)
def test_each_head_learns_the_rule(head, settings, tmp_path):
    result = training(head, tmp_path, 30, **settings).run()
    assert result["test"]["recall@5"] > 0.8  # by chance .13
    assert set(result["strata"]) == {"all", "head", "mid", "tail"}
    assert sum(result["strata"][s]["users"] for s in ("head", "mid", "tail")) == result["strata"]["all"]["users"] == 400
    low, high = result["strata"]["all"]["intervals"]["recall@5"]
    assert low <= result["test"]["recall@5"] <= high


def test_a_killed_training_ends_as_it_would_have(tmp_path):
    whole = training("item", tmp_path / "whole", 4).run()

    class Killed(Exception):
        pass

    def kill(rows):
        if len(rows) == 2:
            raise Killed

    with pytest.raises(Killed):
        training("item", tmp_path / "cut", 4).run(kill)
    rest = training("item", tmp_path / "cut", 4).run()
    for key in ("best_epoch", "epochs", "validation", "test", "strata"):
        assert rest[key] == whole[key], key


def test_the_moving_average_of_the_weights_is_kept(tmp_path):
    run, seen = training("item", tmp_path, 16, average=0.9, patience=16), []
    step = run.step

    def record(*args):
        step(*args)
        seen.append(run.model.table.detach().clone())

    run.step = record
    expected = [run.model.table.detach().clone()]
    best = run.run()["best_epoch"]
    saved = load_file(run.weights(best))["table"]
    for number, table in enumerate(seen, 1):
        expected.append(expected[-1].lerp(table, 1 - min(0.9, number / (number + 9))))
    assert run.steps == len(seen) > 90  # the decay has reached its bound
    torch.testing.assert_close(run.averaged["table"], expected[-1])
    torch.testing.assert_close(saved, expected[best * len(seen) // 16])
    assert training("item", tmp_path / "plain", 1, average=0.0).averaged == {}


@pytest.mark.parametrize("head", ["item", "parallel"])
def test_sparse_gradients_train_and_average_as_dense_ones_do(head, tmp_path, monkeypatch):
    def trained(where, rows):
        monkeypatch.setattr(retriever, "SPARSE_FROM", rows)
        torch.manual_seed(0)
        tokens = ItemTokens.of(codes_of(40), SLOTS).with_ngrams([(0, 1), (0, 1, 2)], 300)
        run = training(head, tmp_path / where, 1, users=100)
        run = RetrievalTraining(run.settings, tokens, run.data, tmp_path / where, 3, Workers())
        run.data.train = Histories(run.data.train.items % 7, run.data.train.starts, run.data.train.targets)
        run.settings = run.settings.model_copy(update={"batch_users": 4})
        run.epoch(1)
        return run

    one, other = trained("sparse", 1), trained("dense", 10**6)
    grads = [table.grad.is_sparse for table in one.model.tables]
    assert grads == [head == "item", True] and not other.model.ngrams.grad.is_sparse
    assert one.steps == other.steps == 25
    for name in ("table", "ngrams"):
        torch.testing.assert_close(one.model.get_parameter(name), other.model.get_parameter(name), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(one.averaged[name], other.averaged[name], rtol=1e-4, atol=1e-6)
    assert (one.model.ngrams != 0).any(1).sum() < 30


def test_rows_that_no_step_uses_are_averaged_as_at_every_step():
    torch.manual_seed(0)
    models = [torch.nn.Embedding(50, 3, sparse=sparse) for sparse in (True, False)]
    models[1].load_state_dict(models[0].state_dict())
    averages = [MovingAverage(model, 0.9) for model in models]
    optimizers = [torch.optim.Adagrad(model.parameters(), lr=0.5) for model in models]
    for step in range(1, 200):
        ids = torch.randint(50 if step % 40 else 3, (2,))
        for model, average, optimizer in zip(models, averages, optimizers):
            optimizer.zero_grad()
            model(ids).square().sum().backward()
            touched = average.touched()
            optimizer.step()
            average.update(step, touched)
        if step % 60 == 0:
            averages[0].settle()
    with averages[0].in_model(), averages[1].in_model():
        torch.testing.assert_close(models[0].weight, models[1].weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(models[0].weight, models[1].weight)
    assert not torch.equal(models[0].weight, averages[0].weights["weight"])


def test_a_test_says_how_many_users_and_repeats_it_has(tmp_path):
    run = training("item", tmp_path, 1)
    everyone, test = run.test(), run.data.test
    assert everyone["test_users"] == everyone["strata"]["all"]["users"] == 400
    again = [test.targets[u] in test.items[test.starts[u] : test.starts[u + 1]] for u in range(400)]
    assert everyone["repeats"] == sum(again) / 400


@pytest.mark.parametrize("head", ["item", "parallel"])
@pytest.mark.parametrize("size", [(7, 4), (60, 2), (64, 256)])
def test_ranks_in_blocks_are_those_of_all_scores(head, size, monkeypatch):
    monkeypatch.setattr(blocks, "ITEMS", size[0])
    monkeypatch.setattr(blocks, "USERS", size[1])
    made, targets = model(head), torch.randint(60, (20,), generator=torch.Generator().manual_seed(1))
    targets[:2] = torch.tensor([0, 1])  # they share a SID
    states = torch.randn(20, 8)
    states[3] = torch.nan
    with torch.inference_mode():
        ranks, everywhere = made.ranks(states, targets, 0, SEEN.repeat(7, 1)[:20])
        assert torch.equal(everywhere, target_ranks(made.scores(states), targets, made.places))
    assert (ranks <= everywhere).logical_or(ranks > 100).all() and everywhere[3] > 160


def test_weights_of_the_target_weigh_the_loss():
    codes = np.array([[0, 0, 0], [1, 1, 1]], np.int32)
    weights = np.ones((2, 3), np.float32)
    weights[:, 2] = (0.0, 2.0)
    tokens = ItemTokens.of(codes, SLOTS, weights)
    logits = [torch.zeros(2, size) for size in tokens.sizes]
    logits[2][0, 0] = -50.0  # very wrong, but of weight 0
    expected = (2 * (np.log(5) + np.log(4)) + 2 * np.log(6)) / 6
    assert retriever.token_loss(logits, tokens, tokens.loss_weights(), torch.tensor([0, 1])).item() == pytest.approx(
        expected, rel=1e-5
    )


def test_the_same_seed_gives_the_same_figures(tmp_path):
    found = [training("autoregressive", tmp_path / name, 2).run()["strata"] for name in "ab"]
    assert found[0] == found[1]


def test_all_slots_reach_every_combination():
    everything = np.array(list(itertools.product(range(4), range(3), range(5))), np.int32)
    prefixes = Prefixes.of(ItemTokens.of(everything, SLOTS))
    assert [len(t) for t in prefixes.token] == [4, 12, 60]


def test_parts_of_like_length_give_the_states_of_the_whole_batch(tmp_path):
    run = training("item", tmp_path, 1)
    run.model.eval()
    ids = torch.from_numpy(run.data.train.last(np.arange(30), 7))
    ids[torch.arange(ids.shape[1]) > torch.arange(30)[:, None] % 5] = -1  # histories of one to five events
    ids = ids[(ids >= 0).sum(1).argsort()]
    inputs, valid = ids[:, :-1], ids[:, 1:] >= 0
    assert len(set(valid.sum(1).tolist())) > 2
    assert torch.allclose(run.model.outputs(inputs, valid), run.model.states(inputs)[valid], atol=1e-6)


def test_without_sampling_the_item_loss_is_the_softmax_over_all_sids(tmp_path):
    run = training("item", tmp_path, 1, negatives=0)
    ids = torch.from_numpy(run.data.train.last(np.arange(8), 7))
    run.model.eval()
    inputs, targets = ids[:, :-1], ids[:, 1:]
    valid = targets >= 0
    scores = run.model.scores(run.model.states(inputs)[valid])  # the 40 items have 40 SIDs
    expected = nnf.cross_entropy(scores, targets[valid])
    assert run._loss(ids, torch.Generator()).item() == pytest.approx(expected.item(), rel=1e-4)


def clumped(run, groups):
    """With an untrained model of items that share SIDs: item i has SID ``groups[i]``."""
    codes = np.stack([groups, np.zeros(40), np.zeros(40)], axis=1).astype(np.int32)
    run.model = heads.build(
        run.settings, ItemTokens.of(codes, (Slot("a", "text", 5), Slot("b", "text", 8), Slot("c", BEHAVIOR, 5)))
    ).eval()
    torch.nn.init.normal_(run.model.table, generator=torch.Generator().manual_seed(1))
    return run


def test_corrected_figures_are_those_of_a_random_order_of_the_items_of_a_sid(tmp_path):
    run = clumped(training("item", tmp_path, 1), np.arange(40) // 8)
    found = by_stratum(run._ranked("test", 100), 0)["all"]
    _, *found_states = zip(*run._states("test", 100))
    states, wanted = map(torch.cat, found_states)
    order = (states @ run.model.vectors(torch.arange(0, 40, 8)).T).argsort(1, descending=True)
    group = (order == (wanted // 8)[:, None]).int().argmax(1)  # 0: the target's SID is the best
    assert found["corrected_recall@5"] == pytest.approx(((group == 0) * 5 / 8).double().mean().item())
    assert found["corrected_recall@20"] == pytest.approx(((group < 2) + (group == 2) * 4 / 8).double().mean().item())
    assert found["recall@20"] == pytest.approx((group * 8 + wanted % 8 < 20).double().mean().item())


def test_lists_without_the_history_are_scored_as_such(tmp_path):
    run = clumped(training("item", tmp_path, 1, repeatable=False), np.arange(40) // 8)
    found = run.test()
    ranks, whole, shared = [], [], []
    for users, states, targets in run._states("test", 100):
        for user, scores, target in zip(users, states @ run.model.vectors(torch.arange(40)).T, targets.tolist()):
            history = set(run.data.test.items[run.data.test.starts[user] : run.data.test.starts[user + 1]].tolist())
            order = sorted(range(40), key=lambda item: (-scores[item].item(), item))
            whole.append(order.index(target) + 1)
            left = [item for item in order if item not in history]
            mates = [place for place, item in enumerate(left) if item // 8 == target // 8]
            ranks.append(left.index(target) + 1 if target in left else 999)
            shared.append(np.mean([place < 10 for place in mates]) if target in left else None)
    assert 0 < ranks.count(999) < 400
    assert found["repeats"] == ranks.count(999) / 400
    assert found["test"]["recall@10"] == pytest.approx(np.mean(np.array(ranks) <= 10))
    assert found["test_repeatable"]["recall@10"] == pytest.approx(np.mean(np.array(whole) <= 10))
    exact = np.mean([0 if share is None else share for share in shared])
    assert found["strata"]["all"]["corrected_recall@10"] == pytest.approx(exact)


def test_a_target_beyond_the_beam_is_no_hit_at_any_depth():
    made = model("autoregressive", items=30, beam=2)
    ranks, _ = made.ranks(torch.randn(50, 8), torch.randint(30, (50,)), 2)
    assert ((ranks <= 6) | (ranks > 100)).all()
    assert (ranks > 100).any()


def test_a_split_without_users_is_named(tmp_path):
    run = training("item", tmp_path, 1)
    run.data.validation = Histories(np.zeros(0, np.int64), np.zeros(1, np.int64), np.zeros(0, np.int64))
    with pytest.raises(InputError, match="retrieval: test has no user in split 'validation'"):
        run.run()


@pytest.mark.parametrize("head", ["item", "parallel", "autoregressive"])
@pytest.mark.parametrize("seen", [None, torch.full((200, 1), -1)])
def test_a_head_that_scores_all_items_alike_is_worth_what_chance_is(head, seen):
    settings = config.Retrieval.model_validate({"head": head, "width": 8, "max_length": 5, "beam": 400})
    codes = np.stack([np.arange(200) // 20, np.arange(200) % 20], axis=1).astype(np.int32)
    made = heads.build(settings, ItemTokens.of(codes, (Slot("a", "text", 10), Slot("b", "text", 20)))).eval()
    with torch.no_grad():
        made.table.zero_()
        ranks, everywhere = made.ranks(torch.zeros(200, 8), torch.arange(200), 400, seen)
    assert torch.equal(ranks, everywhere)
    found = recall_ndcg(ranks)
    assert [found[f"recall@{k}"] for k in (10, 50, 100)] == [k / 200 for k in (10, 50, 100)]
    assert ((ranks.argsort() // 20).diff() < 0).any(), "not by index, which follows popularity"
