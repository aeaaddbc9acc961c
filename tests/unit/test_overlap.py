"""Test repulsion, contrast and MMD against hand-computed values and plain loops."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf

from adasid import config
from adasid.errors import ConfigError
from adasid.losses import overlap
from adasid.losses.mmd import mmd
from adasid.losses.overlap import AdaptiveRepulsion, HammingRepulsion, loads, overlaps, pair_contrast, repulsion
from adasid.tables import PAD


def angles(*degrees):
    """Unit vectors whose cosines are those of the differences."""
    radians = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], 1).requires_grad_()


def cos(degrees):
    return math.cos(math.radians(degrees))


def hamr(slots=3, **settings):
    return HammingRepulsion(config.Hamr(kind="hamr", **settings), slots)


def adaptive(slots=3, **settings):
    return AdaptiveRepulsion(config.Adaptive(kind="adaptive", **settings), slots)


def call(module, z, codes, index=None, paired=None, progress=0.0):
    codes = torch.tensor(codes)
    return module(z, codes, torch.arange(len(codes)) if index is None else torch.tensor(index), paired, progress)


def value(*args, **settings):
    return call(*args, **settings)[0].item()


def test_repulsion_by_kind():
    assert repulsion(None, 3) is None
    assert repulsion(config.Hamr(kind="hamr"), 6).radius == 2
    assert [hamr(slots).radius for slots in (1, 2, 3, 8)] == [1, 1, 1, 3]
    assert hamr(6, radius=4).radius == 4
    assert isinstance(repulsion(config.Adaptive(kind="adaptive"), 6), AdaptiveRepulsion)
    with pytest.raises(ValueError, match="at most 31 slots apart, the tokenizer has 32"):
        repulsion(config.Adaptive(kind="adaptive"), 32)


def pairs(codes, index=None, paired=None):
    codes = torch.as_tensor(codes)
    found = overlaps(codes, torch.arange(len(codes)) if index is None else index, paired)
    return list(zip(found.first.tolist(), found.second.tolist()))


def test_pad_is_never_the_same_code():
    assert pairs([[1, PAD], [1, PAD], [2, 0]]) == [(0, 1)]
    assert pairs([[PAD, PAD]] * 3) == []


def test_same_items_and_constructed_positives_do_not_qualify():
    index, paired = torch.tensor([0, 1, 2, 5, 1, 0]), torch.tensor([True, False, True])
    left_out = {(0, 5), (1, 4), (0, 3), (2, 5)}  # one item twice, or a positive
    everyone = {(i, j) for i in range(6) for j in range(i + 1, 6)}
    assert set(pairs([[7]] * 6, index, paired)) == everyone - left_out
    assert (0, 3) in pairs([[7]] * 6, index)


def test_hamr_by_hand():
    codes = [[1, 2, 3], [1, 2, 3], [1, 2, 9], [7, 2, 9]]  # full: 01; at distance 1: 02, 12, 23; at distance 2: 03, 13
    loss, figures = call(hamr(), angles(0, 60, 80, 200), codes)
    full = 0.8 - (1 - cos(60))
    partial = (0 + (0.5 - (1 - cos(20))) + 0) / 3  # 02 is 1 - cos 80 > 0.5 apart, 23 further
    assert loss.item() == pytest.approx(0.2 * full + 0.1 * partial)
    assert figures == {"full_overlaps": 1, "partial_overlaps": 3}
    assert call(hamr(radius=2), angles(0, 60, 80, 200), codes)[1]["partial_overlaps"] == 5


@pytest.mark.parametrize(("codes", "margin"), [([[1, 2, 3], [1, 2, 3]], 0.8), ([[1, 2, 3], [1, 2, 4]], 0.5)])
def test_hamr_hinge_ends_at_the_margin(codes, margin):
    def at(distance):
        return value(hamr(), angles(0, math.degrees(math.acos(1 - distance))), codes)

    assert at(margin + 1e-6) == 0
    assert at(margin - 1e-3) == pytest.approx((0.2 if margin == 0.8 else 0.1) * 1e-3)


def test_hamr_groups_are_averaged_separately():
    z, partial = angles(0, 0, 0), [[1, 2, 3], [1, 2, 3], [1, 2, 9]]
    assert value(hamr(), z, partial) == pytest.approx(0.2 * 0.8 + 0.1 * 0.5)
    assert value(hamr(full_weight=0.0), z, partial) == pytest.approx(0.1 * 0.5)


def test_hamr_pads():
    z = angles(0, 0)
    for codes, full, partial in (
        ([[1, PAD, PAD], [1, PAD, PAD]], 1, 0),  # agree in all that either has
        ([[PAD, PAD, PAD], [PAD, PAD, PAD]], 0, 0),  # nothing is shared
        ([[1, 2, PAD], [1, 2, 4]], 0, 1),  # one side alone differs
        ([[1, 2, PAD], [1, 5, PAD]], 0, 0),  # the PAD that both have counts as a difference: distance 2
    ):
        assert call(hamr(), z, codes)[1] == {"full_overlaps": full, "partial_overlaps": partial}, codes


@pytest.mark.parametrize("make", [hamr, adaptive])
def test_same_items_and_positives_are_not_repelled(make):
    z, codes = angles(0, 80, 5, 100), [[1, 2, 3]] * 4
    loss, figures = call(make(), z, codes, index=[4, 4, 4, 4])
    assert loss.item() == 0 and set(figures.values()) <= {0.0, 1.0} and next(iter(figures.values())) == 0
    everything, some = (
        call(make(), z, codes, paired=torch.tensor(flags))[1] for flags in ([False, False], [True, True])
    )
    assert (next(iter(everything.values())), next(iter(some.values()))) == (6, 4)
    pair = value(make(), angles(0, 75), codes[:2], paired=torch.tensor([True]))
    assert pair == 0 < value(make(), angles(0, 75), codes[:2])


@pytest.mark.parametrize("make", [hamr, adaptive])
def test_without_overlaps_the_loss_is_zero_and_its_gradient_finite(make):
    z = angles(0, 10, 20)
    loss, figures = call(make(), z, [[0, 1, 2], [3, 4, 5], [PAD, PAD, PAD]])
    loss.backward()
    assert loss.item() == 0 and (z.grad == 0).all()
    assert all(math.isfinite(value) for value in figures.values())


@pytest.mark.parametrize("make", [hamr, adaptive])
def test_the_gradient_moves_both_sides_apart(make):
    z = angles(0, 75)
    call(make(), z, [[1, 2, 3], [1, 2, 3]])[0].backward()
    (a, b), (down_a, down_b) = z.detach(), -z.grad
    assert float(down_a @ b) < 0 and float(down_b @ a) < 0
    assert down_a.norm() == pytest.approx(down_b.norm())


def test_quasid_pushes_the_most_similar_pair_and_adasid_spares_it():
    codes = [[1, 2, 3], [1, 2, 3]]
    loss_of = {
        make: [value(make(), angles(0, degrees), codes) for degrees in (10, 75, 85, 95)] for make in (hamr, adaptive)
    }
    assert loss_of[hamr] == sorted(loss_of[hamr], reverse=True) and loss_of[hamr][0] > loss_of[hamr][1] > 0
    near, middle, far, opposite = loss_of[adaptive]
    assert near == opposite == 0 and middle > far > 0


def test_a_pair_is_spared_from_the_threshold_of_its_overlap():
    low, high = 0.18, 0.3
    for codes, threshold in (
        ([[1, 2, 3], [1, 2, 3]], high),
        ([[1, 2, 3], [1, 2, 9]], (low + high) / 2),
        ([[1, 2, 3], [1, 8, 9]], low),
    ):
        for step, spared in ((1e-4, 1), (-1e-4, 0)):
            loss, figures = call(adaptive(), angles(0, math.degrees(math.acos(threshold + step))), codes)
            assert figures["spared"] == spared
            assert (loss.item() == 0) == bool(spared)


def test_a_margin_that_never_acts_is_refused():
    with pytest.raises(ConfigError, match=r"repulsion.margin 0.8 must be above 1 - 0.18"):
        config.build({"tokenizer": {"repulsion": {"kind": "adaptive", "margin": 0.8}}})


def test_adaptive_by_hand():
    codes = [[1, 2, 3], [1, 2, 9], [1, 2, 8], [7, 2, 6]]  # slots 0, 1: 01, 02, 12 (load 6); slot 1: 03, 13, 23 (load 6)
    z = angles(0, 80, 160, 81)
    hinges = [
        cos(80),
        0,
        cos(80),
        cos(81),
        0,
        cos(79),
    ]  # 01, 02, 12, 03, 13 (spared), 23 (79 degrees: cosine 0.191 is above 0.18, spared)
    hinges[5] = 0
    loss, figures = call(adaptive(), z, codes)
    assert loss.item() == pytest.approx(2 * sum(hinges) / 6)
    assert figures == {"overlaps": 6, "spared": pytest.approx(2 / 6), "strength": 2, "repulsion_weight": 1}


def brute_loads(codes, allowed, by_code):
    """Ordered pair -> load, over all ordered pairs that overlap."""
    kinds = {}
    for i, a in enumerate(codes):
        for j, b in enumerate(codes):
            kind = tuple((int(x) if by_code else 1) if x == y != PAD else None for x, y in zip(a, b))
            if allowed[i, j] and any(part is not None for part in kind):
                kinds.setdefault(kind, []).append((i, j))
    return {pair: len(pairs) for pairs in kinds.values() for pair in pairs}


@pytest.mark.parametrize("by_code", [False, True])
def test_loads_against_a_loop(by_code):
    random = np.random.default_rng(0)
    codes = random.integers(PAD, 4, size=(40, 4))
    index, paired = random.integers(0, 30, 40), random.random(20) < 0.5
    allowed = index[:, None] != index[None, :]
    for half in np.flatnonzero(paired):
        allowed[half, half + 20] = allowed[half + 20, half] = False
    expected = brute_loads(codes, allowed, by_code)
    assert all(expected[i, j] == expected[j, i] for i, j in expected)
    found = overlaps(torch.from_numpy(codes), torch.from_numpy(index), torch.from_numpy(paired))
    where = list(zip(found.first.tolist(), found.second.tolist()))
    load = loads(found, torch.from_numpy(codes), by_code).tolist()
    assert dict(zip(where, load, strict=True)) == {pair: load for pair, load in expected.items() if pair[0] < pair[1]}
    assert found.matching.tolist() == [sum(x == y != PAD for x, y in zip(codes[i], codes[j])) for i, j in where]


@pytest.mark.parametrize("block", [512, 7])
@pytest.mark.parametrize("make", [hamr, adaptive])
def test_losses_and_gradients_against_a_loop(make, block, monkeypatch):
    """As the equations stand, over all pairs, on codes that collide much."""
    monkeypatch.setattr(overlap, "_BLOCK", block)
    random = np.random.default_rng(1)
    codes = random.integers(PAD, 3, size=(30, 3))
    z = torch.from_numpy(random.standard_normal((30, 4)) + 1).requires_grad_()
    module = make().eval()
    if make is adaptive:
        module.full_load.fill_(1)  # all strengths are those of a full load
    found, _ = call(module, z, codes.tolist())
    own = torch.autograd.grad(found, z)[0]
    total, groups, unit = z.new_zeros(()), {}, nnf.normalize(z, dim=1)
    for i in range(30):
        for j in range(i + 1, 30):
            matching, both = (
                sum(f(a, b) for a, b in zip(codes[i], codes[j]))
                for f in (lambda a, b: a == b != PAD, lambda a, b: a == b == PAD)
            )
            cosine = unit[i] @ unit[j]
            if matching and make is hamr:
                kind = "full" if matching == 3 - both else "partial" if 3 - matching <= 1 else None
                margin = {"full": 0.8, "partial": 0.5}.get(kind, 0)
                groups.setdefault(kind, []).append(nnf.relu(margin - 1 + cosine))
            elif matching:
                spared = cosine >= module.thresholds[matching - 1]
                groups.setdefault("all", []).append(
                    module.settings.load_gain[1] * ~spared * nnf.relu(module.settings.margin - 1 + cosine)
                )
    for kind, weight in (("full", 0.2), ("partial", 0.1), ("all", module.weight(0.0) if make is adaptive else 0)):
        total = total + weight * torch.stack(groups.get(kind, [z.new_zeros(())])).mean()
    assert found.item() == pytest.approx(total.item()) and total.item() > 0
    torch.testing.assert_close(own, torch.autograd.grad(total, z)[0])


def test_strength_rises_with_the_load_up_to_full():
    module = adaptive(load_gain=(1.0, 3.0), load_power=2.0).eval()
    module.full_load.fill_(8)
    assert module._strength(torch.tensor([2, 4, 8, 100])).tolist() == pytest.approx([1 + 2 / 16, 1.5, 3, 3])


def test_full_load_is_learned_from_the_first_batches_and_kept():
    module = adaptive(slots=2, load_quantile=0.5)
    crowded, alone = [[1, 2], [1, 3], [1, 4]], [[1, 2], [1, 3], [5, 6]]
    for codes in (crowded, alone, [[0, 1], [2, 3], [4, 5]]):
        call(module, angles(0, 10, 20), codes)
    assert (float(module.full_load), int(module.batches)) == ((6 + 2) / 2, 2)
    again = adaptive(slots=2)
    again.load_state_dict(module.state_dict())
    assert float(again.full_load) == 4
    call(again.eval(), angles(0, 10, 20), crowded)
    assert int(again.batches) == 2
    again.train().batches.fill_(100)
    call(again, angles(0, 10, 20), crowded)
    assert float(again.full_load) == 4


def test_the_full_load_is_the_quantile_over_pairs():
    of_pairs = torch.tensor([10] * 10 + [2] * 2 + [4] * 4)
    for quantile in (0.0, 0.3, 0.75, 1.0):
        module = adaptive(load_quantile=quantile)
        module._strength(of_pairs)
        assert float(module.full_load) == np.quantile(of_pairs.numpy(), quantile, method="inverted_cdf")


def test_the_weight_of_adaptive_repulsion_falls_with_progress():
    module, z, codes = adaptive(), angles(0, 75), [[1, 2, 3], [1, 2, 3]]
    assert [module.weight(t) for t in (0.0, 0.1, 0.5, 0.9, 1.0)] == pytest.approx([1.0, 1.0, 0.6, 0.2, 0.2])
    start, end = (call(module, z, codes, progress=t) for t in (0.0, 1.0))
    assert end[0].item() == pytest.approx(0.2 * start[0].item())
    assert (start[1]["repulsion_weight"], end[1]["repulsion_weight"]) == pytest.approx((1.0, 0.2))
    assert config.AdaptiveSidSettings().contrast.weight[0] == 0


def loop_contrast(z, index, paired, temperature, blocks, worker):
    """The same in plain loops; ``blocks``: (z, index) of each worker."""
    half, losses = len(paired), []
    for side in (0, 1):
        for i in paired.nonzero()[:, 0].tolist():
            own, other = side * half + i, (1 - side) * half + i
            terms = []
            for w, (others, items) in enumerate(blocks):
                for c in range(half):
                    candidate, anchor_side = (1 - side) * half + c, side * half + c
                    same = items[candidate] in (index[other], index[own]) or items[anchor_side] == index[own]
                    if (w, c) == (worker, i) or not same:
                        terms.append(nnf.cosine_similarity(z[own], others[candidate], dim=0) / temperature)
            losses.append(
                torch.logsumexp(torch.stack(terms), 0) - nnf.cosine_similarity(z[own], z[other], dim=0) / temperature
            )
    return torch.stack(losses).mean()


@pytest.mark.parametrize("worker", [0, 1])
def test_pair_contrast_against_a_loop(worker):
    torch.manual_seed(0)
    # item 3 is a partner twice, item 0 has partners twice, item 4 is its own partner, item 1 is an anchor here and a
    # partner there
    blocks = [
        (torch.randn(8, 5), torch.tensor(items)) for items in ([0, 1, 2, 4, 3, 3, 7, 4], [0, 5, 6, 8, 9, 1, 3, 8])
    ]
    paired = [torch.tensor([True, True, True, False]), torch.tensor([True, True, True, False])]
    z, index = blocks[worker]
    z_all, index_all = (torch.cat(part) for part in zip(*blocks))
    found = pair_contrast(z, index, paired[worker], 0.2, z_all, index_all, 8 * worker)
    assert float(found) == pytest.approx(float(loop_contrast(z, index, paired[worker], 0.2, blocks, worker)), rel=1e-5)
    distinct = pair_contrast(z, torch.arange(8) + 8 * worker, paired[worker], 0.2, z_all, torch.arange(16), 8 * worker)
    assert float(distinct) != pytest.approx(float(found), abs=1e-2)


def test_pair_contrast_pulls_pairs_together_and_is_zero_without():
    torch.manual_seed(0)
    z = torch.randn(6, 4, requires_grad=True)
    nothing = pair_contrast(
        z, torch.tensor([0, 1, 2] * 2), torch.zeros(3, dtype=torch.bool), 0.1, z, torch.tensor([0, 1, 2] * 2), 0
    )
    nothing.backward()
    assert nothing.item() == 0 and (z.grad == 0).all()
    index, paired, before = (
        torch.arange(6),
        torch.tensor([True, False, False]),
        nnf.cosine_similarity(z[0], z[3], dim=0).item(),
    )
    pair_contrast(z, index, paired, 0.1, z, index, 0).backward()
    moved = (z - 0.05 * z.grad).detach()
    assert float(nnf.cosine_similarity(moved[0], moved[3], dim=0)) > before


def test_mmd_by_hand():
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0]])
    width = 2 * 0.5 * (2 * (1 + 4 + 1) / 9)  # squared distances 1, 4 and 1, each twice, among nine pairs

    def k(distance):
        return math.exp(-(distance**2) / width)

    assert float(mmd(x, y)) == pytest.approx((2 + 2 * k(1)) / 4 + 1 - 2 * (k(2) + k(1)) / 2)


def test_mmd_tells_distributions_apart():
    torch.manual_seed(0)
    x, y = torch.randn(64, 5), torch.randn(64, 5)
    assert float(mmd(x, x)) == pytest.approx(0, abs=1e-6)
    assert float(mmd(x, x[torch.randperm(64)])) == pytest.approx(0, abs=1e-6)
    assert 0 < 5 * float(mmd(x, y)) < float(mmd(x, y + 1)) < float(mmd(x, y + 3))
    shift = torch.full((5,), 2.0, requires_grad=True)
    mmd(x, x + shift).backward()
    assert (shift.grad > 0).all()


def test_mmd_of_one_point_and_of_nothing_is_finite():
    x = torch.ones(3, 2, requires_grad=True)
    for other in (torch.ones(4, 2), torch.ones(0, 2)):
        loss = mmd(x, other)
        loss.backward()
        assert loss.item() == 0 and torch.isfinite(x.grad).all()
