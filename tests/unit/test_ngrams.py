"""Test n-gram tokens: which combinations are chosen, the hash, and what they do in retrievers and the ranker."""

import struct

import numpy as np
import pytest
import torch

from adasid import config
from adasid.errors import InputError
from adasid.recommenders import heads, ngrams
from adasid.recommenders.ngrams import choose, hashed, rare
from adasid.recommenders.ppnet import ItemVectors
from adasid.recommenders.tokens import ItemTokens
from adasid.sid import Slot, slots_of
from adasid.tables import BEHAVIOR, PAD

SLOTS = (Slot("t0", "text", 4), Slot("t1", "text", 3), Slot("b0", BEHAVIOR, 5))


def fnv_1a(data):
    """FNV-1a with 64 bits, as its authors define it."""
    number = 14695981039346656037
    for byte in data:
        number = (number ^ byte) * 1099511628211 % 2**64
    return number


def test_auto_takes_prefixes_of_residual_slots_pairs_of_parallel_ones_and_one_pair_across():
    slots = slots_of({"text": 3, "behavior": 2}, 10)
    assert choose("auto", slots, parallel=False) == ((0, 1), (0, 1, 2), (3, 4), (0, 3))
    assert choose("auto", slots, parallel=True) == ((0, 1), (0, 2), (1, 2), (3, 4), (0, 3))
    assert choose("none", slots, parallel=True) == ()
    shared = slots_of({"shared": 2, "text": 2, "behavior": 2}, 10)
    assert choose("auto", shared, parallel=False) == ((0, 1), (0, 2), (0, 2, 3), (0, 4), (0, 4, 5), (2, 4))
    assert choose("auto", shared, parallel=True) == ((0, 1), (2, 3), (4, 5), (0, 2), (2, 4))
    long = slots_of({"text": 6}, 10)
    assert choose("auto", long, parallel=False) == ((0, 1), (0, 1, 2), (0, 1, 2, 3))
    assert choose("auto", long, parallel=True) == ((0, 1), (2, 3), (4, 5))
    odd = slots_of({"behavior": 5}, 10)
    assert choose("auto", odd, parallel=True) == ((0, 1), (2, 3), (3, 4)), "no slot is without a pair"


def test_named_slots_are_combined_in_the_order_of_the_sid_and_an_unknown_one_is_named():
    assert choose((("b0", "t0"), ("t1", "b0")), SLOTS, parallel=True) == ((0, 2), (1, 2))
    with pytest.raises(InputError, match="'v0' is no slot of the tokenizer: name some of t0, t1, b0"):
        choose((("t0", "v0"),), SLOTS, parallel=True)


def test_the_hash_is_that_of_other_languages():
    codes = torch.tensor([[17, 5, 70_000], [0, 5, 2**31 - 1]])
    rows = hashed(codes, [(0, 1), (0, 1, 2)], 8192)
    for item, row in zip(codes.tolist(), rows.tolist()):
        for ngram, value in zip([(0, 1), (0, 1, 2)], row):
            number = fnv_1a(b"".join(struct.pack("<II", slot, item[slot]) for slot in ngram))
            assert value == (number >> 32 ^ number & 0xFFFFFFFF) % 8192
    assert rows[0, 0] == 5890  # the example of docs/methods.md 7.7
    assert rows.dtype == torch.int32


def test_an_ngram_with_pad_is_lacking_and_equal_codes_share_a_row():
    codes = torch.tensor([[0, 1, PAD], [0, 1, 2], [0, 2, 2]])
    rows = hashed(codes, [(0, 1), (1, 2)], 1000)
    assert rows[0, 1] == 1000
    assert rows[0, 0] == rows[1, 0] != rows[2, 0]
    tokens = ItemTokens.of(codes.numpy().astype(np.int32), SLOTS)
    assert torch.equal(tokens.codes, codes.int())
    assert torch.equal(tokens.with_ngrams([(0, 1), (1, 2)], 1000).ngrams, rows)


@pytest.mark.parametrize("counted", [1 << 20, 2])
def test_an_ngram_of_few_trained_items_is_lacking(counted, monkeypatch):
    monkeypatch.setattr(ngrams, "_COUNTED", counted)
    codes = np.array([[0, 1, 2], [0, 1, 3], [0, 1, 3], [1, 1, 3], [PAD, 1, 3]], np.int32)
    trained = torch.tensor([True, True, False, False, True])
    grams = [(0, 1), (1, 2)]
    some = torch.from_numpy(codes)
    assert rare(some, (0, 1), trained, 1).tolist() == [False, False, False, True, False]
    assert not rare(some, (1, 2), trained, 1).any()
    assert rare(some, (0, 1), trained, 2).tolist() == [False, False, False, True, True]
    assert rare(some, (1, 2), trained, 2).tolist() == [True, False, False, False, False]
    tokens = ItemTokens.of(codes, SLOTS)
    every, common = tokens.with_ngrams(grams, 50), tokens.with_ngrams(grams, 50, trained, 2)
    lacking = torch.stack([rare(tokens.codes, gram, trained, 2) for gram in grams], dim=1)
    expected = every.ngrams.masked_fill(lacking, 50)
    assert torch.equal(common.ngrams, expected) and (common.ngrams[3, 0], common.ngrams[4, 0]) == (50, 50)


def test_rows_spread_evenly():
    codes = torch.cartesian_prod(torch.arange(100), torch.arange(100))
    used = torch.bincount(hashed(codes, [(0, 1)], 4096)[:, 0].long(), minlength=4096)
    expected = len(codes) / 4096
    assert (used.float().var() / expected).item() == pytest.approx(1, abs=0.25)  # 1 at random


@pytest.fixture
def catalogue():
    codes = np.array([[0, 0, 0], [0, 1, PAD], [3, 2, 4], [0, 0, 4]], np.int32)
    return ItemTokens.of(codes, SLOTS).with_ngrams([(0, 1), (1, 2)], 50)


@pytest.mark.parametrize("head", ["item", "parallel", "autoregressive"])
def test_an_item_is_the_sum_of_its_tokens_and_ngrams(head, catalogue):
    torch.manual_seed(0)
    model = heads.build(config.Retrieval(head=head, width=8, dropout=0.0), catalogue).eval()
    items = torch.arange(4)
    plain = model.vectors(items)
    assert not model.ngrams.any(), "an n-gram starts at zero"
    torch.nn.init.normal_(model.ngrams)
    expected = plain.clone()
    for item in range(4):
        for row in catalogue.ngrams[item].tolist():
            if row < 50:
                expected[item] = expected[item] + model.ngrams[row] / 3**0.5
    torch.testing.assert_close(model.vectors(items), expected)
    model.vectors(items).sum().backward()
    assert not model.ngrams.grad[50].any(), "the row of lacking n-grams is never used"
    assert [id(table) for table in model.tables] == [id(model.table), id(model.ngrams)]


def test_without_ngrams_a_model_has_no_table_of_them(catalogue):
    plain = catalogue.with_ngrams((), 50)
    assert heads.build(config.Retrieval(width=8), plain).ngrams is None
    assert ItemVectors(config.Ranking(width=6), plain).ngrams is None
    assert plain.behavior_first().to("cpu").ngrams.shape == (4, 0)
    moved = catalogue.behavior_first().to("cpu")
    assert torch.equal(moved.ngrams, catalogue.ngrams), "n-grams do not depend on the order of decoding"


@pytest.mark.parametrize("items", ["concat", "sum"])
def test_ngrams_are_added_to_the_vectors_of_a_ranking_model(items, catalogue):
    vectors = ItemVectors(config.Ranking(items=items, width=6), catalogue)
    at = torch.tensor([[0, 1], [2, 3]])
    plain = vectors(at)
    torch.nn.init.normal_(vectors.ngrams)
    rows = catalogue.ngrams[at].long()
    table = torch.cat([vectors.ngrams[:50], torch.zeros(1, 6)])
    torch.testing.assert_close(vectors(at), plain + table[rows].sum(-2))


def test_prefixes_are_ngrams_of_all_lengths(catalogue):
    vectors = ItemVectors(config.Ranking(items="prefix", width=6, ngram_rows=1000), catalogue)
    assert torch.equal(vectors.rows, hashed(catalogue.codes, [(0,), (0, 1), (0, 1, 2)], 1000, False))
    assert vectors.ngrams is None
    codes = torch.tensor([[PAD, PAD, 1], [PAD, PAD, 2], [PAD, 2, 2]])
    absent = ItemVectors(vectors.settings, ItemTokens.of(codes.numpy().astype(np.int32), SLOTS))
    assert len(absent.rows.unique(dim=0)) == 3, "codes after PAD tell items apart"
    assert int(absent.rows.max()) < 1000


def test_in_training_a_share_of_the_items_has_no_ngrams(catalogue):
    torch.manual_seed(0)
    model = heads.build(config.Retrieval(width=8, dropout=0.0, ngram_dropout=0.3), catalogue)
    items = torch.zeros(2000, dtype=torch.int64)
    plain = model.vectors(items[:1])
    torch.nn.init.normal_(model.ngrams)
    whole = model.eval().vectors(items)
    assert (whole == whole[0]).all() and not torch.equal(whole[:1], plain)
    without = (model.train().vectors(items) - plain).abs().sum(1) < 1e-6
    assert without.double().mean().item() == pytest.approx(0.3, abs=0.03)
    assert torch.allclose(model.vectors(items).max(0).values, torch.maximum(whole[0], plain[0]))
