import math

import pytest
import torch
import torch.nn.functional as nnf

from adasid.losses.alignment import alignment_weight, calibrated_beta, info_nce
from adasid.losses.routing import SparsityController, sparsity_loss


@pytest.mark.parametrize(
    ("x", "alpha", "beta", "w"),
    [
        (0.0, 10, 9, 0.0002),
        (0.5, 10, 9, 0.0246),
        (0.9, 10, 9, 0.684),
        (1.0, 10, 9, 1.0),
        (0.35, 20, 7, 0.5),
        (0.45, 20, 9, 0.5),
        (0.7, 20, 14, 0.5),
    ],
)
def test_alignment_weight_has_the_papers_shape(x, alpha, beta, w):
    assert float(alignment_weight(torch.tensor(x), alpha, beta)) == pytest.approx(w, abs=3e-3)


def test_alignment_weight_rises_to_one():
    w = alignment_weight(torch.linspace(0, 1, 101), 10, 9)
    assert (w.diff() > 0).all()
    assert w.min() > 0
    assert float(w[-1]) == pytest.approx(1.0)


@pytest.mark.parametrize("quantile", [0.0, 0.2, 0.56, 0.65])
def test_calibrated_beta_puts_the_quantile_at_the_weak_weight(quantile):
    beta = calibrated_beta(quantile, 10.0)
    assert float(alignment_weight(torch.tensor(quantile, dtype=torch.float64), 10.0, beta)) == pytest.approx(
        0.05, abs=1e-6
    )


def test_calibrated_beta_is_bounded_where_no_beta_can_reach_it():
    assert math.isfinite(calibrated_beta(0.99, 10.0))


def test_info_nce_is_the_printed_formula():
    torch.manual_seed(0)
    a, c, tau = torch.randn(5, 8), torch.randn(5, 8), 0.07
    cosine = nnf.cosine_similarity(a[:, None], c[None], dim=2) / tau
    for j, loss in enumerate(info_nce(a, c, torch.arange(5), tau)):
        assert float(loss) == pytest.approx(float(-cosine[j, j] + torch.logsumexp(cosine[j], 0)), rel=1e-3, abs=1e-6)


def test_info_nce_leaves_absent_candidates_out_and_stays_finite():
    torch.manual_seed(0)
    a, c = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)
    valid = torch.tensor([True, True, False, True])
    loss = info_nce(a, c, torch.arange(4), 0.07, valid)
    alone = info_nce(a[:2], c[[0, 1, 3]], torch.tensor([0, 1]), 0.07)
    assert torch.allclose(loss[:2], alone, atol=1e-5)
    (loss * valid).sum().backward()
    assert torch.isfinite(a.grad).all()
    assert (a.grad[2] == 0).all()


def test_sparsity_loss_is_l1_at_balance_and_weighs_busy_experts_more():
    gates = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]])
    balanced = sparsity_loss(gates, torch.full((3,), 2 / 3), 1 / 3)
    assert float(balanced) == pytest.approx(gates.sum(1).mean())
    busy = sparsity_loss(gates, torch.tensor([1.0, 0.5, 0.5]), 0.5)
    assert float(busy) == pytest.approx((2 * 1 + 1 * 3 + 1 * 2) / 2)


def test_lambda_follows_the_sign_rule_and_its_bounds():
    controller = SparsityController(1e-8, 1.2)
    controller.update(0.1, 1 / 3)
    assert float(controller.weight) == pytest.approx(1.2e-8)
    controller.update(0.5, 1 / 3)
    controller.update(1 / 3, 1 / 3)
    assert float(controller.weight) == pytest.approx(1e-8 / 1.2)
    for _ in range(1000):
        controller.update(0.0, 0.5)
    assert float(controller.weight) == 100.0
