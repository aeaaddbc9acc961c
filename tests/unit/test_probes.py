"""Test probes of codes against closed forms."""

import numpy as np
import pytest
import torch

from adasid.metrics.probes import Readout, agreement, duplicates_kept, shared_cosine
from adasid.tables import PAD


def readout(codes, x, present=None, size=4):
    probe = Readout(codes.shape[1], size, {"text": x.shape[1]})
    there = torch.ones(len(x), dtype=torch.bool) if present is None else present
    for start in range(0, len(x), 300):
        part = slice(start, start + 300)
        probe.add(codes[part], torch.arange(len(x))[part], {"text": x[part]}, {"text": there[part]})
    return probe.unexplained()["text"]


def test_readout_of_a_sum_of_code_vectors_leaves_the_noise():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(4, (5000, 3), generator=generator)
    tables = torch.randn(3, 4, 6, generator=generator)
    clean = sum(tables[slot][codes[:, slot]] for slot in range(3)) + 5
    noise = torch.randn(5000, 6, generator=generator) * 0.5
    x = clean + noise
    expected = float((noise**2).sum() / ((x - x.mean(0)) ** 2).sum())
    assert readout(codes, x) == pytest.approx(expected, rel=0.05)


def test_readout_of_random_codes_explains_nothing_and_absent_rows_do_not_count():
    generator = torch.Generator().manual_seed(1)
    codes, x = torch.randint(4, (4000, 2), generator=generator), torch.randn(4000, 5, generator=generator)
    assert readout(codes, x) == pytest.approx(1, abs=0.02)
    present = torch.rand(4000, generator=generator) < 0.5
    dirty = torch.where(present[:, None], x, torch.full_like(x, 1e3))
    assert readout(codes, dirty, present) == pytest.approx(1, abs=0.03)


def test_pad_is_a_symbol_of_the_readout():
    codes = torch.tensor([[0], [PAD]]).repeat(500, 1)
    x = torch.where(codes == PAD, 3.0, -1.0)
    assert readout(codes, x) == pytest.approx(0, abs=1e-3)


def test_agreement_by_hand():
    codes = np.array([[1, 2], [1, 2], [1, 3], [0, 3], [PAD, PAD], [PAD, PAD]], np.int32)
    kinds = np.array([7, 7, 8, 8, 9, 9])
    # item 0: item 1 shares both codes (same kind), item 2 one code (other kind)
    assert agreement(codes, kinds, np.array([0]), 1) == 1
    assert agreement(codes, kinds, np.array([0]), 2) == 0.5
    # item 2 shares one code with 0, 1 and 3: the one place is shared by the three, one of them of its kind
    assert agreement(codes, kinds, np.array([2]), 1) == pytest.approx(1 / 3)
    # PAD equals nothing: item 4's place is shared by all five others, one of its kind
    assert agreement(codes, kinds, np.array([4]), 1) == pytest.approx(1 / 5)
    unknown = np.where(kinds == 8, -1, kinds)
    assert agreement(codes, unknown, np.array([0, 2]), 2) == 0.5, "items of unknown kind are left out"


def test_agreement_does_not_depend_on_the_order_of_rows():
    rng = np.random.default_rng(0)
    codes, kinds = rng.integers(3, size=(200, 3)).astype(np.int32), rng.integers(4, size=200)
    order = rng.permutation(200)
    whole = agreement(codes, kinds, np.arange(200), 5)
    assert agreement(codes[order], kinds[order], np.arange(200), 5) == pytest.approx(whole, abs=1e-6)


def test_the_cosine_of_items_that_share_a_sid_is_the_mean_over_pairs():
    rng = np.random.default_rng(0)
    codes, vectors = rng.integers(0, 3, (60, 2)).astype(np.int32), rng.normal(size=(60, 5)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = [vectors[i] @ vectors[j] for i in range(60) for j in range(i) if (codes[i] == codes[j]).all()]
    assert shared_cosine(codes, vectors) == pytest.approx(np.mean(pairs), rel=1e-5)
    assert np.isnan(shared_cosine(np.arange(8, dtype=np.int32).reshape(4, 2), vectors[:4]))
    lacking = np.vstack([vectors, np.zeros((9, 5), np.float32)])  # items without content
    assert shared_cosine(np.vstack([codes, codes[:9]]), lacking) == shared_cosine(codes, vectors)
    assert np.isnan(shared_cosine(np.zeros((2, 2), np.int32), np.zeros((2, 5), np.float32)))


def test_near_duplicates_that_have_one_sid():
    vectors = np.array([[1, 0], [0.999, 0.0447], [0, 1], [0.0447, 0.999], [-1, 0]], np.float32)
    codes = np.array(
        [[1, 2], [1, 2], [1, 2], [1, 3], [1, 2]], np.int32
    )  # 0 and 1 are together, 2 and 3 are not, others are no duplicates
    assert duplicates_kept(codes, vectors, np.arange(5), 0.95) == 0.5
    assert duplicates_kept(codes, vectors, np.array([0, 4]), 0.95) == 1.0
    assert duplicates_kept(codes, vectors, np.array([2]), 0.95) == 0.0
    assert np.isnan(duplicates_kept(codes, vectors, np.array([4]), 0.95))


def test_probes_of_nothing_are_not_numbers():
    codes, x = torch.zeros(10, 2, dtype=torch.int64), torch.randn(10, 3)
    assert np.isnan(readout(codes, x, torch.zeros(10, dtype=torch.bool)))
    assert np.isnan(readout(codes, torch.ones(10, 3))), "no variance to explain"
    assert np.isnan(readout(codes[:1], x[:1])), "no item to fit"
    assert np.isnan(agreement(np.zeros((1, 2), np.int32), np.zeros(1, np.int64), np.zeros(1, np.int64), 10))


def test_fewer_items_than_neighbours_are_all_neighbours():
    codes = np.array([[0, 0], [0, 0], [0, 1], [2, 3]], np.int32)
    kinds = np.array([0, 0, 0, 1])
    assert agreement(codes, kinds, np.arange(3), 10) == pytest.approx(2 / 3)  # two of the three others
