import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from adasid.experts import GroupedLinear, Trunk
from adasid.quantizers.experts import ExpertCodebooks, codebook_loss
from adasid.quantizers.kmeans import lloyd_round, means_of, nearest, previous_or_nearest, spherical_kmeans
from adasid.quantizers.residual import ResidualCodebooks
from adasid.sid import PreviousCodes


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def clusters(n=400, k=6, d=16, noise=0.15, seed=0):
    rng = np.random.default_rng(seed)
    label = rng.integers(k, size=n)
    return torch.tensor(rng.normal(size=(k, d))[label] + noise * rng.normal(size=(n, d)), dtype=torch.float32), label


def test_kmeans_recovers_planted_clusters_and_matches_a_library():
    x, label = clusters()
    centroids = spherical_kmeans(x, 6, 20, generator())
    unit = nnf.normalize(x, dim=1)
    cosine, assigned = nearest(unit, centroids)
    assert adjusted_rand_score(label, assigned.numpy()) > 0.99
    library = KMeans(6, n_init=5, random_state=0).fit(unit.numpy())
    assert adjusted_rand_score(library.labels_, assigned.numpy()) > 0.99
    assert cosine.mean() >= nearest(unit, nnf.normalize(torch.tensor(library.cluster_centers_), dim=1))[0].mean() - 1e-3


def test_kmeans_leaves_no_empty_cluster_and_takes_fewer_points_than_clusters():
    x, _ = clusters(n=300, k=3, noise=0.01)
    centroids = spherical_kmeans(x, 40, 10, generator())
    assert torch.allclose(centroids.norm(dim=1), torch.ones(40), atol=1e-5)
    assert len(nearest(nnf.normalize(x, dim=1), centroids)[1].unique()) > 30
    few = spherical_kmeans(x[:5], 8, 10, generator())
    assert few.shape == (8, 16)
    assert torch.isfinite(few).all()


def test_kmeans_is_deterministic_for_a_seed():
    x, _ = clusters()
    assert torch.equal(spherical_kmeans(x, 6, 5, generator(3)), spherical_kmeans(x, 6, 5, generator(3)))


def test_codes_are_the_largest_cosine_and_ignore_length():
    torch.manual_seed(0)
    books = ExpertCodebooks(3, 11, 8)
    z = torch.randn(3, 50, 8)
    codes = books.codes(z)
    for slot in range(3):
        expected = nnf.cosine_similarity(z[slot][:, None], books.weight[slot][None], dim=2).argmax(1)
        assert torch.equal(codes[slot], expected)
    assert torch.equal(codes, books.codes(z * torch.rand(3, 50, 1).add(0.1)))
    assert torch.equal(codes, books(z).codes)


def test_straight_through_gives_codebooks_no_gradient_and_the_codebook_loss_does():
    torch.manual_seed(0)
    books = ExpertCodebooks(2, 5, 4)
    latents = torch.randn(2, 7, 4, requires_grad=True)
    out = books(latents)
    z, z_q = out.latents.sum(0), out.codewords.sum(0)
    (z + (z_q - z).detach()).square().sum().backward()
    assert books.weight.grad is None
    assert latents.grad is not None
    codebook_loss(books(latents), torch.ones(2, 7, dtype=torch.bool), 0.25).backward()
    assert books.weight.grad.abs().sum() > 0


def test_codebook_loss_by_hand():
    books = ExpertCodebooks(1, 2, 2)
    books.weight.data = torch.tensor([[[2.0, 0.0], [0.0, 3.0]]])
    latents = torch.tensor([[[5.0, 0.0], [1.0, 1.0], [0.0, 9.0]]])
    active = torch.tensor([[True, True, False]])
    half = 2 - 2 * np.cos(np.pi / 4)
    assert codebook_loss(books(latents), active, 0.25).item() == pytest.approx(1.25 * half / 3, rel=1e-5)


def test_a_damped_slot_quantizes_what_earlier_slots_leave_in_the_dimensions_that_it_reads():
    before = torch.tensor([[False, False, False], [True, False, False], [True, True, False]])
    reads = torch.tensor([[True, True], [True, False], [False, True]])
    books = ExpertCodebooks(3, 2, 2, "euclidean", 0.5, before, reads)
    books.weight.data = torch.tensor([[[4.0, 2], [0, 0]], [[1.0, 0], [3, 0]], [[0.0, 0], [0, -1]]])
    latents = torch.tensor([[[5.0, 1]], [[5.0, 0]], [[0.0, 1]]])
    # slot 0: (5, 1) -> (4, 2). Slot 1: (5, 0) - half of (4, .) -> (3, 0). Slot 2: (0, 1) - half of (., 2 + 0) -> (0, 0)
    out = books(latents)
    assert out.codes[:, 0].tolist() == [0, 1, 0]
    assert out.latents[:, 0].tolist() == [[5, 1], [3, 0], [0, 0]]
    assert torch.equal(books.codes(latents), out.codes)
    kept = books(latents, PreviousCodes(torch.tensor([[1], [0], [0]]), 100.0))
    assert kept.codes[:, 0].tolist() == [1, 0, 0], "previous codes are kept, and what they leave is quantized"
    assert kept.latents[:, 0].tolist() == [[5, 1], [5, 0], [0, 1]]


def test_damped_codebooks_are_initialised_slot_by_slot_as_they_quantize():
    rows = torch.randn(1, 500, 4, generator=generator()).expand(3, -1, -1)
    before = torch.ones(3, 3).tril(-1).bool()
    books = ExpertCodebooks(3, 16, 4, "euclidean", 1.0, before)
    books.initialise(rows, torch.ones(3, 500, dtype=torch.bool), 20, generator(1))
    with torch.no_grad():
        out = books(rows)
    error = [float((rows[0] - out.codewords[: slot + 1].sum(0)).square().sum()) for slot in range(3)]
    assert error[0] > 2 * error[1] > 4 * error[2], "with damping 1 the slots are residual"
    for slot in range(3):
        means, _ = lloyd_round(out.latents[slot], books.weight[slot].detach())
        assert (means - books.weight[slot]).norm() < 0.1 * books.weight[slot].norm()


def test_a_damped_slot_is_fitted_to_what_earlier_slots_leave_of_its_own_sample():
    """Large catalogues: shared slots and those of a modality have different samples."""
    rows = torch.randn(1, 1000, 4, generator=generator()).expand(2, -1, -1)
    active = torch.arange(1000) < 500
    books = ExpertCodebooks(2, 16, 4, "euclidean", 1.0, torch.ones(2, 2).tril(-1).bool())
    books.initialise(rows, torch.stack([active, ~active]), 20, generator(1))
    with torch.no_grad():
        out = books(rows)
    means, _ = lloyd_round(out.latents[1, ~active], books.weight[1].detach())
    assert (means - books.weight[1]).norm() < 0.1 * books.weight[1].norm()
    error = [float((rows[0] - out.codewords[: slot + 1].sum(0))[~active].square().sum()) for slot in range(2)]
    assert error[0] > 2 * error[1]


def test_damped_codebooks_that_start_from_previous_codes_are_the_means_of_what_these_codes_leave():
    x = torch.randn(1, 60, 4, generator=generator()).expand(2, -1, -1)
    previous = torch.stack([torch.arange(60) % 3, torch.arange(60) // 20])
    weights = torch.linspace(1, 5, 60)
    books = ExpertCodebooks(2, 3, 4, "euclidean", 0.5, torch.ones(2, 2).tril(-1).bool())
    books.initialise(x, torch.ones(2, 60, dtype=torch.bool), 5, generator(1), previous, weights)

    def means(rows, codes):
        return torch.stack([(rows * weights[:, None])[codes == c].sum(0) / weights[codes == c].sum() for c in range(3)])

    first = means(x[0], previous[0])
    torch.testing.assert_close(books.weight[0].detach(), first)
    torch.testing.assert_close(books.weight[1].detach(), means(x[1] - 0.5 * first[previous[0]], previous[1]))


def test_dead_codes_come_back_from_active_latents():
    torch.manual_seed(0)
    books = ExpertCodebooks(2, 4, 3)
    before = books.weight.detach().clone()
    latents = torch.randn(2, 6, 3)
    active = torch.tensor([[True] * 6, [False] * 5 + [True]])
    used = torch.tensor([[10.0, 10, 10, 0], [10, 0, 10, 10]])
    books.used.copy_(used)
    dead = books.revive(latents, active, 0.1, generator())
    assert books.used.sum() == 0
    assert dead.nonzero().tolist() == [[0, 3], [1, 1]]
    assert torch.equal(books.weight[0, :3], before[0, :3])
    assert torch.allclose(books.weight[1, 1], nnf.normalize(latents[1, 5], dim=0))
    assert float(
        (latents[0] / latents[0].norm(dim=1, keepdim=True) @ books.weight[0, 3].detach()).max()
    ) == pytest.approx(1, abs=1e-5)


def test_usage_counts_active_rows_only():
    books = ExpertCodebooks(1, 3, 2)
    assert books.counts(torch.tensor([[0, 0, 2, 1]]), torch.tensor([[True, True, True, False]])).tolist() == [[2, 0, 1]]


def test_grouped_experts_equal_a_loop_over_experts():
    torch.manual_seed(0)
    layer = GroupedLinear(4, 6, 5)
    x = torch.randn(4, 9, 6)
    loop = torch.stack([x[g] @ layer.weight[g] + layer.bias[g] for g in range(4)])
    assert torch.allclose(layer(x), loop, atol=1e-6)

    trunk = Trunk(7, 3, (8, 6), 5, [(4, 2)])
    y = torch.randn(10, 7)
    latents, (head,) = trunk(y)
    for g in range(3):
        first = torch.relu(y @ trunk.first.weight[8 * g : 8 * g + 8].T + trunk.first.bias[8 * g : 8 * g + 8])
        second = torch.relu(first @ trunk.rest[0].weight[g] + trunk.rest[0].bias[g])
        assert torch.allclose(latents[g], second @ trunk.rest[1].weight[g] + trunk.rest[1].bias[g], atol=1e-5)
    assert head.shape == (10, 2)


def test_a_previous_code_stays_within_the_tolerance():
    distances = torch.tensor([[1.0, 1.4, 3.0], [2.0, 0.5, 0.7], [0.0, 0.1, 0.2]])
    held = torch.tensor([1, -1, 0])
    assert previous_or_nearest(distances, None).tolist() == [0, 1, 0]
    assert previous_or_nearest(distances, PreviousCodes(held, 0.5)).tolist() == [1, 1, 0]
    assert previous_or_nearest(distances, PreviousCodes(held, 0.3)).tolist() == [0, 1, 0]
    assert previous_or_nearest(distances, PreviousCodes(torch.tensor([2, 2, 2]), 0.5)).tolist() == [0, 2, 0]


def test_a_kept_code_is_not_replaced_however_rare():
    latents, active = (
        nnf.normalize(torch.randn(1, 50, 4, generator=generator()), dim=2),
        torch.ones(1, 50, dtype=torch.bool),
    )
    for books in (ExpertCodebooks(1, 3, 4), ResidualCodebooks(1, 3, 4)):
        books.used = torch.tensor([[98.0, 1.0, 1.0]])
        books.kept = torch.tensor([[False, True, False]])
        before = books.weight.detach().clone()
        assert books.revive(latents, active, 0.25, generator()).tolist() == [[False, False, True]]
        assert torch.equal(books.weight[0, :2], before[0, :2]) and not torch.equal(books.weight[0, 2], before[0, 2])


def test_codebooks_that_start_from_previous_codes_are_their_means():
    x, held = torch.tensor([[0.0, 0.0], [2.0, 0.0], [9.0, 9.0]]), torch.tensor([1, 1, -1])
    found = means_of(x, held, torch.full((3, 2), 5.0))
    assert found.tolist() == [[5, 5], [1, 0], [5, 5]]
    assert (
        PreviousCodes(held, 0.5).at(1.0).slack == 0.5
        and PreviousCodes(held, 0.5).at(0.1).slack == 5
        and PreviousCodes(held, 0.5).at(0.0).slack > 1e5
    )
    books = ResidualCodebooks(2, 3, 2)
    codes = torch.tensor([[2, 0], [2, 1], [0, -1]])
    books.initialise(x, 5, torch.Generator().manual_seed(0), codes)
    torch.testing.assert_close(books.weight[0, 2], x[:2].mean(0))
    torch.testing.assert_close(books.weight[1, :2], x[:2] - x[:2].mean(0))
    cosine = ExpertCodebooks(1, 3, 2)
    cosine.initialise(
        x[None, 1:], torch.ones(1, 2, dtype=torch.bool), 5, torch.Generator().manual_seed(0), held[None, 1:]
    )
    torch.testing.assert_close(cosine.weight[0, 1], torch.tensor([1.0, 0.0]))
