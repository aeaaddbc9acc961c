"""Test tokenizers that are fitted, or need no data: residual k-means, OPQ and the controls, with the k-means and the
rotation beneath them."""

import sys

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score

from adasid import config
from adasid.data.shards import Batch
from adasid.distributed import Workers
from adasid.errors import InputError
from adasid.quantizers import product
from adasid.quantizers.kmeans import balanced_assignment, kmeans, lloyd_round, nearest_euclidean, squared_distances
from adasid.tables import BEHAVIOR, PAD
from adasid.tokenizers.base import sample
from adasid.tokenizers.controls.model import ItemId, RandomSid
from adasid.tokenizers.opq.model import Opq
from adasid.tokenizers.rq_kmeans.model import ResidualCentroids, RqKmeans
from tests.planted import catalogue, shard

CONTENT = ("text", "visual")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def clusters(n=2000, k=20, d=8, noise=0.2, seed=0):
    rng = np.random.default_rng(seed)
    label = rng.integers(k, size=n)
    return torch.tensor(rng.normal(size=(k, d))[label] + noise * rng.normal(size=(n, d)), dtype=torch.float32), label


def inertia(x, centroids):
    return float((x - centroids[nearest_euclidean(x, centroids)]).square().sum())


def fitted(kind, settings, data, seed=0):
    torch.manual_seed(5)
    tokenizer = kind(settings, data.widths)
    tokenizer.prepare(data, Workers())
    tokenizer.fit(data, Workers(), generator(seed))
    return tokenizer


def everything(data):
    return data.take(np.arange(len(data)))


def indices(index):
    index = torch.as_tensor(index)
    return Batch({}, {}, torch.zeros(len(index)), index)


def by_level(tokenizer, batch, modality):
    """Share of the modality's variance that is left after each number of levels."""
    words, left = tokenizer.quantizers[modality].centroids, []
    x = tokenizer._space(modality, batch, None)[0][batch.present[modality]]
    for level in range(len(words) + 1):
        left.append(float(x.square().sum()))
        if level < len(words):
            x = x - words[level][nearest_euclidean(x, words[level].to(x))]
    return np.array(left) / left[0]


# k-means


def test_kmeans_recovers_planted_clusters_and_is_as_good_as_a_library():
    x, label = clusters(k=12)
    centroids = kmeans(x, 12, 30, generator())
    assert adjusted_rand_score(label, nearest_euclidean(x, centroids).numpy()) > 0.99
    hard = torch.randn(2000, 8, generator=generator(1))
    library = KMeans(30, n_init=3, random_state=0).fit(hard.numpy())
    assert inertia(hard, kmeans(hard, 30, 50, generator())) < 1.02 * library.inertia_
    assert torch.equal(kmeans(hard, 30, 5, generator(3)), kmeans(hard, 30, 5, generator(3)))


def test_weighted_kmeans_is_that_of_repeated_points_and_as_good_as_a_library():
    hard = torch.randn(600, 4, generator=generator(1))
    weights = torch.randint(1, 9, (600,), generator=generator(2)).float()
    start = hard[:10].clone()
    once, repeated = start, start
    for _ in range(4):
        once, assigned = lloyd_round(hard, once, weights=weights)
        repeated, _ = lloyd_round(hard.repeat_interleave(weights.long(), dim=0), repeated)
        torch.testing.assert_close(once, repeated)

    def cost(centroids):
        return float((weights * (hard - centroids[nearest_euclidean(hard, centroids)]).square().sum(1)).sum())

    library = KMeans(30, n_init=3, random_state=0).fit(hard.numpy(), sample_weight=weights.numpy())
    fit = kmeans(hard, 30, 50, generator(), weights=weights)
    assert cost(fit) < 1.03 * cost(torch.tensor(library.cluster_centers_))
    assert cost(fit) < cost(kmeans(hard, 30, 50, generator()))


def test_an_empty_cluster_restarts_at_the_point_of_the_largest_weighted_distance():
    x = torch.tensor([[0.0], [1.0], [5.0], [3.0]])
    means, assigned = lloyd_round(x, torch.tensor([[0.5], [100.0]]), weights=torch.tensor([1.0, 1.0, 1.0, 9.0]))
    assert assigned.tolist() == [0, 0, 0, 0]
    assert means[:, 0].tolist() == [(0 + 1 + 5 + 27) / 12, 3.0]


def test_kmeans_restarts_empty_clusters_and_takes_fewer_points_than_clusters():
    x, _ = clusters(n=500, k=3)
    far = torch.cat([x[:1].expand(6, -1), x[:1] + 100 + torch.rand(6, 1)])
    centroids = far
    for _ in range(10):
        centroids, _ = lloyd_round(x, centroids)
    assert len(nearest_euclidean(x, centroids).unique()) == 12
    few = kmeans(x[:5], 8, 10, generator())
    assert few.shape == (8, 8)
    assert torch.equal(few[:5], x[:5])
    same = kmeans(torch.ones(20, 3), 4, 5, generator())
    assert torch.equal(same, torch.ones(4, 3))


def test_ties_go_to_the_lowest_code_whatever_the_batch():
    centroids = torch.tensor([[5.0, 0, 0.3], [1 / 3, 0.1, 0.7], [5.0, 0, 0.3], [1 / 3, 0.1, 0.7]])
    x = torch.randn(300, 3, generator=generator(), dtype=torch.float64) + torch.tensor([2.5, 0, 0])
    codes = nearest_euclidean(x, centroids.double())
    assert set(codes.tolist()) == {0, 1}
    assert torch.equal(codes, torch.cat([nearest_euclidean(row[None], centroids.double()) for row in x]))


def test_balanced_assignment_fills_no_cluster_above_its_share_and_is_stable():
    skewed = torch.cat(
        [0.1 * torch.randn(700, 4, generator=generator()), 3 * torch.randn(303, 4, generator=generator(1))]
    )
    costs = squared_distances(skewed, kmeans(skewed, 20, 10, generator()))
    assert torch.bincount(costs.argmin(1)).max() > 100, "the nearest centroid alone is far from balanced"
    for capacity in (-(-1003 // 20), 80):
        assigned = balanced_assignment(costs, capacity)
        sizes = torch.bincount(assigned, minlength=20)
        assert sizes.max() == capacity
        mine = costs.gather(1, assigned[:, None])
        worst = torch.stack(
            [costs[assigned == j, j].max() if (assigned == j).any() else torch.tensor(0.0) for j in range(20)]
        )
        would_rather = (costs < mine) & ((costs < worst) | (sizes < capacity))
        assert not would_rather.any()
    even = balanced_assignment(costs[:1000], 50)
    assert torch.bincount(even).tolist() == [50] * 20
    alike = balanced_assignment(torch.ones(12, 4), 3)
    assert torch.bincount(alike).tolist() == [3] * 4


def test_balanced_kmeans_spreads_codes_more_evenly_than_the_plain_one():
    x, label = clusters(n=1200, k=6, noise=0.5)
    x[:800] = x[:800] * 0.05
    sizes = {
        b: torch.bincount(nearest_euclidean(x, kmeans(x, 24, 20, generator(), b)), minlength=24) for b in (False, True)
    }
    assert sizes[True].max() < 0.8 * sizes[False].max()
    even, _ = clusters(n=600, k=6, noise=0.05)
    assert (
        adjusted_rand_score(
            clusters(n=600, k=6)[1], nearest_euclidean(even, kmeans(even, 6, 20, generator(), True)).numpy()
        )
        > 0.9
    )


# product quantization


def correlated(n=1500, parts=4, width=3, seed=0):
    """Sub-spaces with clusters of their own, turned by a random rotation."""
    rng = np.random.default_rng(seed)
    plain = np.concatenate(
        [rng.normal(size=(8, width))[rng.integers(8, size=n)] for _ in range(parts)], 1
    ) + 0.05 * rng.normal(size=(n, parts * width))
    turn, _ = np.linalg.qr(rng.normal(size=(parts * width, parts * width)))
    return torch.tensor(plain @ turn, dtype=torch.float32)


def test_principal_components_agree_with_a_library_and_undo_themselves():
    x = torch.randn(300, 10, generator=generator()) @ torch.randn(10, 10, generator=generator(1)) + 3
    library = PCA(4, whiten=True).fit(x.numpy())
    ours = product.principal_components(x, 4, True)
    expected = library.transform(x.numpy()) * np.sqrt(300 / 299)  # the library divides by n - 1
    assert np.allclose(np.abs(ours.project(x).numpy()), np.abs(expected), atol=1e-3)
    whole = product.principal_components(x, 10, False)
    assert torch.allclose(whole.restore(whole.project(x)), x, atol=1e-3)
    flat = product.principal_components(torch.cat([x, torch.zeros(300, 2)], 1), 12, True)
    assert torch.allclose(flat.restore(flat.project(torch.cat([x, torch.zeros(300, 2)], 1)))[:, :10], x, atol=1e-2)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_opq_rotates_without_stretching_and_its_error_falls(momentum):
    x = correlated()
    quantizer, errors = product.fit_opq(x, 4, 8, 25, momentum, generator())
    assert torch.allclose(quantizer.rotation @ quantizer.rotation.T, torch.eye(12), atol=1e-5)
    rises = sum(b > a * (1 + 1e-5) for a, b in zip(errors, errors[1:]))
    assert rises <= (3 if momentum else 0)
    assert errors[-1] < 0.7 * errors[0]
    error = float((quantizer.decode(quantizer.codes(x)) - x).square().sum(1).mean())
    assert error <= errors[-1] * (1 + 1e-5)


def test_opq_beats_product_quantization_on_rotated_data():
    turned = correlated()
    quantizer, errors = product.fit_opq(turned, 4, 8, 40, 0.9, generator())
    without = torch.stack([kmeans(part, 8, 40, generator()) for part in turned.chunk(4, dim=1)])
    pq = product.ProductQuantizer(torch.eye(12), without)
    assert errors[-1] < 0.8 * float((pq.decode(pq.codes(turned)) - turned).square().sum(1).mean())


def test_momentum_reaches_the_error_of_many_more_rounds():
    x = clusters(n=2000, k=30, d=24, noise=1.0)[0]
    plain, with_it = (
        product.fit_opq(x, 4, 16, 40, 0.0, generator())[1],
        product.fit_opq(x, 4, 16, 20, 0.9, generator())[1],
    )
    assert with_it[-1] < plain[-1] < plain[20]


def test_procrustes_finds_the_rotation():
    x = torch.randn(50, 6, generator=generator())
    turn, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator(1)))
    assert torch.allclose(product.procrustes(x, x @ turn), turn, atol=1e-5)


def test_opq_is_as_good_as_faiss():
    pytest.importorskip("faiss")
    x = clusters(n=2000, k=30, d=24, noise=1.0)[0]
    x = product.principal_components(x, 24, True).project(x)
    theirs = product.fit_opq_faiss(x, 4, 16, 30)
    _, errors = product.fit_opq(x, 4, 16, 30, 0.9, generator())
    assert torch.allclose(theirs.rotation @ theirs.rotation.T, torch.eye(24), atol=1e-4)
    assert errors[-1] < 1.03 * float((theirs.decode(theirs.codes(x)) - x).square().sum(1).mean())
    with pytest.raises(InputError, match="at least codebook_size 16 items"):
        product.fit_opq_faiss(x[:9], 4, 16, 2)


def test_faiss_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(InputError, match=r"pip install faiss-cpu, or use tokenizer\.engine: own"):
        product.fit_opq_faiss(torch.zeros(9, 4), 2, 4, 1)


# tokenizers

PLAIN = {"codebook_size": 8, "rounds": 20}
FITTED = {
    "plain": (RqKmeans, config.RqKmeansSettings(levels=3, **PLAIN)),
    "balanced": (RqKmeans, config.RqKmeansSettings(levels=3, balanced=True, **PLAIN)),
    "by modality": (RqKmeans, config.RqKmeansSettings(levels={"text": 2, "visual": 1, BEHAVIOR: 2}, **PLAIN)),
    "aligned": (RqKmeans, config.RqKmeansSettings(levels=2, aligner=config.Aligner(width=8, hidden=(16,)), **PLAIN)),
    "opq": (Opq, config.OpqSettings(levels=3, width=12, **PLAIN)),
    "opq by modality": (Opq, config.OpqSettings(levels={"text": 2, "visual": 1, BEHAVIOR: 2}, width=12, **PLAIN)),
    "opq K=100": (Opq, config.OpqSettings(levels=3, width=12, codebook_size=100, rounds=5)),
    "item-id": (ItemId, config.ItemIdSettings(codebook_size=9, levels=3)),
    "random": (RandomSid, config.RandomSidSettings(codebook_size=9, levels=3)),
}


@pytest.fixture(scope="module", params=FITTED)
def done(request):
    kind, settings = FITTED[request.param]
    table, cluster = catalogue()
    data = shard(table, settings.inputs)
    return kind, settings, fitted(kind, settings, data), data, cluster


def test_codes_depend_on_the_item_alone_and_on_the_state_dict(done):
    kind, settings, tokenizer, data, _ = done
    whole = tokenizer.encode(everything(data))
    assert whole.codes.dtype == torch.int32
    assert whole.codes.shape == (len(data), len(tokenizer.slots))
    assert ((whole.codes >= 0) | (whole.codes == PAD)).all()
    assert whole.codes.max() < settings.codebook_size
    assert torch.equal(whole.weights, (whole.codes != PAD).float())
    assert torch.equal(whole.active, whole.weights > 0)
    order = np.random.default_rng(0).permutation(len(data))
    assert torch.equal(whole.codes[order], tokenizer.encode(data.take(order)).codes)
    single = torch.cat([tokenizer.encode(data.take(np.array([i]))).codes for i in range(0, len(data), 29)])
    assert torch.equal(whole.codes[::29], single)
    torch.manual_seed(99)
    other = kind(settings, data.widths)
    other.load_state_dict(tokenizer.state_dict())
    assert torch.equal(other.encode(everything(data)).codes, whole.codes)
    again = fitted(kind, settings, data)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in tokenizer.state_dict().items())


def test_reconstruction_has_the_inputs_scale(done):
    _, settings, tokenizer, data, _ = done
    batch = everything(data)
    decoded = tokenizer.reconstruct(batch)
    assert set(decoded) == (
        set()
        if isinstance(tokenizer, ItemId | RandomSid) or getattr(settings, "aligner", None)
        else set(settings.inputs)
    )
    for m, y in decoded.items():
        there = batch.present[m]
        error = (y - batch.vectors[m])[there].square().sum() / (
            batch.vectors[m][there] - batch.vectors[m][there].mean(0)
        ).square().sum()
        assert error < (0.75 if m == BEHAVIOR else 0.4), m


def test_planted_clusters_are_recovered():
    table, cluster = catalogue()
    for name in ("plain", "balanced", "by modality"):
        kind, settings = FITTED[name]
        data = shard(table, settings.inputs)
        there = everything(data).present["visual"].numpy()
        codes = [fitted(kind, settings, data, seed).encode(everything(data)).codes.numpy()[there] for seed in range(3)]
        found = [adjusted_rand_score(cluster[there], c[:, 0]) for c in codes]
        assert min(found) > 0.8, "one start of k-means may merge two clusters"
        assert max(found) > 0.99


def test_names_and_pads_by_modality():
    table, _ = catalogue()
    kind, settings = FITTED["by modality"]
    data = shard(table, settings.inputs)
    tokenizer = fitted(kind, settings, data)
    assert [(slot.name, slot.kind) for slot in tokenizer.slots] == [
        ("t0", "text"),
        ("t1", "text"),
        ("v0", "visual"),
        ("b0", BEHAVIOR),
        ("b1", BEHAVIOR),
    ]
    alike = RqKmeans(config.RqKmeansSettings(levels={"text": 1, "title": 1}), {"text": 3, "title": 4})
    assert [slot.name for slot in alike.slots] == ["te0", "ti0"]
    batch = everything(data)
    codes = tokenizer.encode(batch).codes
    for index, slot in enumerate(tokenizer.slots):
        assert torch.equal(codes[:, index] == PAD, ~batch.present[slot.kind])
    left = by_level(tokenizer, batch, "text")
    assert (np.diff(left) < 0).all()


def test_residual_error_falls_from_level_to_level():
    table, _ = catalogue()
    errors = []
    for levels in (1, 2, 4):
        data = shard(table, CONTENT)
        tokenizer = fitted(RqKmeans, config.RqKmeansSettings(levels=levels, **PLAIN), data)
        batch = everything(data)
        errors.append(float((tokenizer.reconstruct(batch)["text"] - batch.vectors["text"]).square().mean()))
    assert errors[1] < 0.97 * errors[0]
    assert errors[2] < 0.97 * errors[1]


def test_the_fit_sees_a_sample_and_all_items_are_assigned():
    table, cluster = catalogue()
    data = shard(table, CONTENT)
    settings = config.RqKmeansSettings(levels=2, fit_samples=100, **PLAIN)
    assert sum(len(batch) for batch in sample(data, Workers(), 100)) == 100
    tokenizer = fitted(RqKmeans, settings, data)
    codes = tokenizer.encode(everything(data)).codes
    assert codes.shape == (600, 2)
    assert adjusted_rand_score(cluster, codes[:, 0].numpy()) > 0.9
    assert not torch.equal(
        tokenizer.quantizers["shared"].centroids, fitted(*FITTED["plain"], data).quantizers["shared"].centroids[:2]
    )


def test_opq_keeps_what_fits_and_refuses_too_many_slots():
    joint = Opq(config.OpqSettings(levels=6, width=96), {"text": 24, "visual": 16}).quantizers["shared"]
    assert joint.get_buffer("basis").shape == (40, 36)
    each = Opq(config.OpqSettings(levels={"text": 2, "visual": 3}, width=12), {"text": 24, "visual": 10}).quantizers
    assert [each[m].get_buffer("basis").shape for m in ("text", "visual")] == [(24, 12), (10, 9)]
    with pytest.raises(InputError, match=r"tokenizer\.levels is 6, but the content has 5 dimensions"):
        Opq(config.OpqSettings(levels=6, width=6, content=("text",)), {"text": 5})


def test_the_aligner_draws_co_engaged_items_together():
    table, cluster = catalogue()
    settings = config.RqKmeansSettings(levels=2, aligner=config.Aligner(width=8, hidden=(32,)), **PLAIN)
    data = shard(table, CONTENT, cluster=cluster)
    torch.manual_seed(5)
    tokenizer = RqKmeans(settings, data.widths)
    tokenizer.prepare(data, Workers())
    random = np.random.default_rng(0)
    losses = []
    for _ in range(60):
        loss = tokenizer.losses(data.take_pairs(random.permutation(600)[:64], random), Workers(), 0.0).total
        parameters = list(tokenizer.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
            parameter.data -= 0.1 * gradient
        losses.append(float(loss.detach()))
    assert np.mean(losses[-5:]) < 0.8 * losses[0]
    tokenizer.fit(data, Workers(), generator())
    assert adjusted_rand_score(cluster, tokenizer.encode(everything(data)).codes[:, 0].numpy()) > 0.95
    with pytest.raises(NotImplementedError):
        RqKmeans(config.RqKmeansSettings(), data.widths).losses(everything(data), Workers(), 0.0)


# controls


def test_item_ids_are_unique_and_no_digit_says_how_popular_an_item_is():
    tokenizer = ItemId(config.ItemIdSettings(codebook_size=7, levels=4), {})
    codes = tokenizer.encode(indices(np.arange(7**4))).codes
    assert len(torch.unique(codes, dim=0)) == 7**4 and codes.min() == 0 and codes.max() == 6
    torch.testing.assert_close(codes, tokenizer.encode(indices(np.arange(7**4))).codes)
    assert [slot.name for slot in tokenizer.slots] == ["i0", "i1", "i2", "i3"]
    with pytest.raises(InputError, match=r"item_index 2401 does not fit .* raise tokenizer\.levels"):
        tokenizer.encode(indices([2401]))
    long = ItemId(config.ItemIdSettings(codebook_size=100, levels=12), {})  # 10^24 codes, more than an int64 counts
    few = long.encode(indices(np.arange(1000))).codes.numpy()
    assert len(np.unique(few, axis=0)) == 1000
    for digits in (codes.numpy(), few):  # the index is a rank by popularity
        ranks = [abs(np.corrcoef(np.arange(len(digits)), column)[0, 1]) for column in digits.T]
        assert max(ranks) < 5 / len(digits) ** 0.5, ranks
        counts = [np.bincount(column, minlength=column.max() + 1) for column in digits.T]
        assert all(count.max() < 3 * count.mean() + 10 for count in counts)
    table, _ = catalogue(items=300)
    with pytest.raises(InputError, match=r"item_index 299 does not fit"):
        ItemId(config.ItemIdSettings(codebook_size=6, levels=3), {}).prepare(shard(table, ()), Workers())


def splitmix(seed, index):
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_random_codes_by_hand():
    assert splitmix(1234567, 0) == 6457827717110365317, "the reference generator's first value for this seed"
    tokenizer = RandomSid(config.RandomSidSettings(codebook_size=100, levels=3), {})
    tokenizer.salt.fill_(-5)
    codes = tokenizer.encode(indices([0, 77, 10**9])).codes
    expected = [
        [(splitmix(splitmix(2**64 - 5, slot), index) >> 1) % 100 for slot in range(3)] for index in (0, 77, 10**9)
    ]
    assert codes.tolist() == expected


def test_random_codes_are_uniform_independent_and_of_the_seed():
    def codes(seed):
        torch.manual_seed(seed)
        tokenizer = RandomSid(config.RandomSidSettings(codebook_size=32, levels=4), {})
        return tokenizer.encode(indices(np.arange(20_000))).codes.long()

    first = codes(1)
    expected = 20_000 / 32
    for slot in first.T:
        assert float(((torch.bincount(slot, minlength=32) - expected) ** 2 / expected).sum()) < 31 + 6 * 62**0.5
    pairs = torch.bincount(first[:, 0] * 32 + first[:, 1], minlength=1024)
    assert float(((pairs - expected / 32) ** 2 / (expected / 32)).sum()) < 1023 + 6 * 2046**0.5
    assert torch.equal(first, codes(1))
    assert (first == codes(2)).float().mean() < 0.05


# soft residual


def test_a_damped_slot_quantizes_what_half_of_the_earlier_codewords_leave():
    x = torch.tensor([[4.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    quantizer = ResidualCentroids(3, 2, 2, damping=0.5)
    quantizer.centroids.copy_(
        torch.tensor([[[4.0, 0], [0, 4]], [[2.0, 0], [0, 0]], [[1.0, 1], [0, -1]]]),
    )
    result = quantizer(x)
    # item 0: (4, 0) -> (4, 0); (2, 0) -> (2, 0); (1, 0) -> (1, 1)
    # item 1: (0, 2) -> (0, 4); (0, 0) -> (0, 0); (0, 0) -> (0, -1)
    assert result.codes.tolist() == [[0, 0, 0], [1, 1, 1]]
    assert result.decoded.tolist() == [[4.0, 1.0], [0.0, 1.0]]  # half of the first two, and the last
    assert result.rest.tolist() == [[0.5, -0.5], [0.0, 0.5]]


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_damping_decides_what_the_fit_of_the_next_level_sees(damping):
    table, _ = catalogue()
    settings = config.RqKmeansSettings(levels={"text": 2}, codebook_size=8, rounds=10, damping=damping)
    tokenizer = fitted(RqKmeans, settings, shard(table, ("text",)))
    first, second = tokenizer.quantizers["text"].centroids
    x = tokenizer._space("text", everything(shard(table, ("text",))), None)[0].float()
    rest = x - damping * first[nearest_euclidean(x, first)]
    means, assigned = lloyd_round(rest, second)
    torch.testing.assert_close(means, second, atol=0.05, rtol=0)  # k-means of what is left has converged there
    assert len(assigned.unique()) == 8


def test_shared_slots_read_all_modalities_and_the_others_what_they_leave():
    table, _ = catalogue()
    data = shard(table, ("text", BEHAVIOR))
    levels = {"shared": 1, "text": 1, BEHAVIOR: 2}
    settings = config.RqKmeansSettings(levels=levels, codebook_size=8, rounds=10, damping=0.5, content_weight=0.7)
    tokenizer, batch = fitted(RqKmeans, settings, data), everything(data)
    assert [slot.name for slot in tokenizer.slots] == ["s0", "t0", "b0", "b1"]
    inputs = tokenizer.inputs(batch)
    width = {m: x.shape[1] for m, x in inputs.items()}
    scale = {"text": 0.7 / width["text"] ** 0.5, BEHAVIOR: 1 / width[BEHAVIOR] ** 0.5}
    joint = torch.cat([inputs[m] * scale[m] for m in width], dim=1).double()
    words = tokenizer.quantizers["shared"].centroids[0].double()
    codes = tokenizer.encode(batch).codes
    assert torch.equal(codes[:, 0].long(), nearest_euclidean(joint, words))
    rest = inputs["text"] - 0.5 * words[codes[:, 0].long()][:, : width["text"]] / scale["text"]
    text = tokenizer.quantizers["text"].centroids[0].double()
    assert torch.equal(codes[:, 1].long(), nearest_euclidean(rest, text))
    absent = ~batch.present[BEHAVIOR]
    assert absent.any()
    assert (codes[absent, 2:] == PAD).all()
    assert (codes[absent, :2] != PAD).all()
    decoded = tokenizer.reconstruct(batch)
    alone = fitted(RqKmeans, config.RqKmeansSettings(levels={"text": 1}, codebook_size=8, rounds=10), data)
    error = [((out["text"] - batch.vectors["text"]) ** 2).sum() for out in (decoded, alone.reconstruct(batch))]
    assert error[0] < error[1], "a shared and a text code say more of the text than a text code"


def test_an_item_counts_by_its_interactions():
    table, _ = catalogue()
    data = shard(table, ("text",))
    base = {"levels": {"text": 1}, "codebook_size": 8, "rounds": 30}
    plain, weighted = (
        fitted(RqKmeans, config.RqKmeansSettings(**base, count_power=power), data) for power in (0.0, 1.0)
    )
    batch = everything(data)
    weights = (batch.counts + 1).double()

    def cost(tokenizer):
        x = tokenizer._space("text", batch, None)[0]
        words = tokenizer.quantizers["text"].centroids[0].double()
        return float((weights * (x - words[nearest_euclidean(x, words)]).square().sum(1)).sum())

    assert cost(weighted) < cost(plain)
    base = {"levels": {"text": 2}, "width": 24, "whiten": False, "codebook_size": 8, "rounds": 30}
    turned = [fitted(Opq, config.OpqSettings(**base, count_power=power), data) for power in (0.0, 1.0)]
    error = [
        float((weights * (out.reconstruct(batch)["text"] - batch.vectors["text"]).square().sum(1)).sum())
        for out in turned
    ]
    assert error[1] < error[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": {"text": 2, "shared": 1}}, "name 'shared' first and a modality after it"),
        ({"levels": {"shared": 1}}, "name 'shared' first and a modality after it"),
        ({"balanced": True, "count_power": 0.5}, "clusters of equal size, but tokenizer.count_power is 0.5"),
        ({"damping": 1.5}, "damping"),
    ],
)
def test_settings_that_contradict_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        config.RqKmeansSettings.model_validate(settings)


def test_only_rq_kmeans_has_shared_slots_among_others():
    with pytest.raises(ValueError, match="'shared' is not a content modality"):
        config.OpqSettings.model_validate({"levels": {"shared": 1, "text": 2}})
