"""Test residual codebooks against hand-computed values and against vector-quantize-pytorch."""

import pytest
import torch

from adasid.quantizers.experts import ExpertCodebooks
from adasid.quantizers.residual import Residual, ResidualCodebooks, residual_loss, sinkhorn


def books(levels=3, size=10, width=6, seed=0):
    torch.manual_seed(seed)
    return ResidualCodebooks(levels, size, width)


def test_two_levels_by_hand():
    found = books(2, 2, 2)
    with torch.no_grad():
        found.weight.copy_(torch.tensor([[[0.0, 0.0], [4.0, 0.0]], [[1.0, 0.0], [0.0, -1.0]]]))
    z = torch.tensor([[4.9, 0.2], [0.1, -0.8]])
    out = found(z)
    assert out.codes.tolist() == [[1, 0], [0, 1]]
    assert torch.allclose(out.quantized, torch.tensor([[5.0, 0.0], [0.0, -1.0]]))
    assert torch.allclose(out.residuals[1], torch.tensor([[0.9, 0.2], [0.1, -0.8]]))
    # level 1: (.9^2 + .2^2) / 2 and (.1^2 + .8^2) / 2; level 2: (.1^2 + .2^2) / 2 twice; both halves of the loss have
    # these values
    expected = 1.25 * ((0.85 + 0.65) / 4 + (0.05 + 0.05) / 4)
    assert residual_loss(out, torch.tensor([True, True]), 0.25).item() == pytest.approx(expected, rel=1e-5)
    assert residual_loss(out, torch.tensor([True, False]), 0.25).item() == pytest.approx(
        1.25 * (0.85 + 0.05) / 4, rel=1e-5
    )


def test_codes_and_vectors_are_those_of_vector_quantize_pytorch():
    residual_vq = (
        pytest.importorskip("vector_quantize_pytorch").ResidualVQ(dim=6, num_quantizers=3, codebook_size=10).eval()
    )
    ours = books()
    with torch.no_grad():
        ours.weight.copy_(residual_vq.codebooks)
    z = torch.randn(200, 6, generator=torch.Generator().manual_seed(1))
    quantized, codes, _ = residual_vq(z[:, None])
    out = ours(z)
    assert torch.equal(out.codes, codes[:, 0])
    assert torch.allclose(out.quantized, quantized[:, 0], atol=1e-5)


def test_cosine_codes_are_those_of_vector_quantize_pytorch():
    vq = (
        pytest.importorskip("vector_quantize_pytorch")
        .VectorQuantize(dim=6, codebook_size=10, use_cosine_sim=True)
        .eval()
    )
    ours = ExpertCodebooks(1, 10, 6)
    with torch.no_grad():
        ours.weight.copy_(vq.codebook[None])
    z = torch.randn(200, 6, generator=torch.Generator().manual_seed(1))
    quantized, codes, _ = vq(z[:, None])
    assert torch.equal(ours(z[None]).codes[0], codes[:, 0])
    assert torch.allclose(ours(z[None]).codewords[0], quantized[:, 0], atol=1e-5)


def test_each_half_of_the_loss_moves_its_own_side():
    found, there = books(), torch.ones(50, dtype=torch.bool)
    z = torch.randn(50, 6, generator=torch.Generator().manual_seed(2), requires_grad=True)
    residual_loss(found(z), there, 0.0).backward()
    assert z.grad is None or not z.grad.any()
    assert found.weight.grad.abs().sum() > 0
    out = found(z)
    words = Residual(out.codes, out.quantized, out.residuals, out.codewords.detach())
    found.weight.grad = None
    (residual_loss(words, there, 1.0) - residual_loss(words, there, 0.0)).backward()
    assert z.grad.abs().sum() > 0
    assert found.weight.grad is None, "the residual holds no gradient to the codewords"


def test_initialisation_lowers_the_error_level_by_level():
    found = books(4, 12, 6)
    z = torch.randn(3000, 6, generator=torch.Generator().manual_seed(3))
    found.initialise(z, 10, torch.Generator().manual_seed(0))
    out = found(z)
    errors = [float((r.detach() ** 2).sum()) for r in [*out.residuals, z - out.quantized]]
    assert all(b < 0.8 * a for a, b in zip(errors, errors[1:]))


def test_dead_codes_come_back_as_residuals_of_their_level():
    found = books()
    z = torch.randn(64, 6, generator=torch.Generator().manual_seed(4))
    out = found(z)
    found.used.copy_(torch.full((3, 10), 5.0))
    found.used[1, 3] = 0
    before = found.weight.detach().clone()
    even = (torch.arange(64) % 2 == 0).expand(3, -1)
    dead = found.revive(out.residuals.detach(), even, 0.25, torch.Generator().manual_seed(0))
    assert dead.nonzero().tolist() == [[1, 3]]
    assert (found.weight[1, 3] == out.residuals[1][::2]).all(1).any(), "a residual of an item that counts"
    assert torch.equal(found.weight[~dead], before[~dead])
    assert not found.used.any()


def test_sinkhorn_is_balanced_and_prefers_near_codes():
    x = torch.randn(400, 2, generator=torch.Generator().manual_seed(5))
    distance = torch.cdist(x, torch.tensor([[0.0, 0.0], [3.0, 3.0]])) ** 2
    assert (distance.argmin(1) == 0).float().mean() > 0.9
    plan = sinkhorn(distance, 0.05, 200)
    assert torch.allclose(plan.sum(1), torch.full((400,), 1 / 400, dtype=torch.float64))
    assert torch.allclose(plan.sum(0), torch.full((2,), 0.5, dtype=torch.float64), atol=1e-3)
    second = plan.argmax(1) == 1
    assert 0.45 < second.float().mean() < 0.55
    gap = distance[:, 1] - distance[:, 0]
    assert gap[second].max() < gap[~second].min() + 1e-5, "the items for which the second code costs least"
