"""Test codes that keep their meaning: matching against brute force, and a relabelled tokenizer through its artifact."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch

from adasid import config
from adasid.data.shards import Batch
from adasid.sid import PreviousCodes, Slot
from adasid.tables import PAD
from adasid.tokenizers import artifact
from adasid.tokenizers.relabel import Relabelled, match

SLOTS = (Slot("s0", "shared", 4), Slot("b0", "behavior", 4), Slot("b1", "behavior", 4))


def renamed(found, order, names):
    """What :class:`Relabelled` shows of ``found``."""
    shown = found[:, order]
    return np.where(shown == PAD, PAD, np.take_along_axis(names, np.maximum(shown, 0).T, axis=1).T)


def test_a_permutation_of_codes_and_slots_is_undone():
    rng = np.random.default_rng(0)
    published = rng.integers(0, 4, (400, 3)).astype(np.int32)
    published[:20, 1:] = PAD
    turned = np.array([rng.permutation(4) for _ in SLOTS])
    swapped = published[:, [0, 2, 1]]
    found = np.where(swapped == PAD, PAD, np.take_along_axis(turned, np.maximum(swapped, 0).T, axis=1).T).astype(
        np.int32
    )
    order, names = match(published, found, SLOTS, True)
    assert order.tolist() == [0, 2, 1]
    assert (renamed(found, order, names) == published).all()


def test_the_match_is_the_best_there_is():
    rng = np.random.default_rng(1)
    published, found = rng.integers(0, 4, (2, 60, 3)).astype(np.int32)
    assert match(published, found, SLOTS, False)[0].tolist() == [0, 1, 2]  # residual levels keep their places
    order, names = match(published, found, SLOTS, True)
    kept = (renamed(found, order, names) == published).sum(0)
    best = [
        [
            max((np.array(p)[found[:, new]] == published[:, old]).sum() for p in permutations(range(4)))
            for new in range(3)
        ]
        for old in range(3)
    ]
    assert kept[0] == best[0][0]
    assert kept[1:].sum() == max(best[1][1] + best[2][2], best[1][2] + best[2][1])


def test_a_renamed_tokenizer_decodes_as_before_and_survives_its_artifact(tmp_path):
    settings = config.RqKmeansSettings(levels={"text": 2}, codebook_size=5)
    tokenizer = artifact.build(settings, {"text": 6})
    torch.manual_seed(0)
    tokenizer.quantizers["text"].get_buffer("centroids").normal_()
    x = torch.randn(30, 6)
    batch = Batch({"text": x}, {"text": torch.arange(30) > 1}, torch.zeros(30), torch.arange(30))
    first = tokenizer.encode(batch).codes
    turned = Relabelled(tokenizer)
    turned.rename(np.where(first == PAD, PAD, (first.numpy() + 1) % 5).astype(np.int32), first.numpy())
    manifest = artifact.write(tmp_path / "plain", tokenizer, settings, {})
    shown = turned.encode(batch).codes
    held = torch.where(shown == PAD, PAD, (shown + 2) % 5).long()
    assert torch.equal(turned.encode(replace(batch, previous=PreviousCodes(held, 1e9))).codes.long(), held)
    written = artifact.rewrite(tmp_path / "turned", turned, manifest)
    assert written.relabelled and not manifest.relabelled and written.digest != manifest.digest
    again, _ = artifact.read(tmp_path / "turned")
    assert isinstance(again, Relabelled)
    codes = again.encode(batch).codes
    assert torch.equal(codes, torch.where(first == PAD, PAD, (first + 1) % 5))
    assert torch.equal(again.reconstruct(batch)["text"], tokenizer.reconstruct(batch)["text"])


@pytest.mark.parametrize("name", ["rq-kmeans", "opq"])
def test_refining_goes_on_from_what_was_fitted(name):
    from tests.unit.test_fitted import CONTENT, catalogue, shard

    table, _ = catalogue()
    sections = {"rq-kmeans": {"levels": {"text": 2}}, "opq": {"levels": {"text": 2}, "width": 8}}
    settings = {"rq-kmeans": config.RqKmeansSettings, "opq": config.OpqSettings}[name].model_validate(
        {**sections[name], "codebook_size": 8, "rounds": 4}
    )
    data = shard(table, CONTENT)
    from adasid.distributed import Workers

    tokenizer = artifact.build(settings, data.widths)
    tokenizer.prepare(data, Workers())
    tokenizer.fit(data, Workers(), torch.Generator().manual_seed(0))
    batch = data.take(np.arange(len(data)))

    def error():
        return float(
            (tokenizer.reconstruct(batch)["text"] - batch.vectors["text"])[batch.present["text"]].square().sum(1).mean()
        )

    before, codes = error(), tokenizer.encode(batch).codes
    tokenizer.refine(data, Workers(), 6, torch.Generator().manual_seed(1))
    assert error() <= before * (1 + 1e-6)
    assert (tokenizer.encode(batch).codes == codes).float().mean() > 0.7
