"""One behavioural suite for every tokenizer: to add one, add a line to TOKENIZERS."""

import json

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from adasid import config
from adasid.errors import InputError, TrainingError
from adasid.tables import BEHAVIOR, PAD
from adasid.tokenizers import artifact
from adasid.tokenizers.base import Slot, token
from adasid.training.shards import Batch
from adasid.training.tokenizer import TokenizerTraining
from adasid.training.workers import Workers
from tests.planted import catalogue, shard

TRAINING = {"epochs": 80, "batch": 128, "lr": 0.003, "log_epochs": 1, "checkpoint_epochs": 10}
SMALL = {
    "latent_width": 16,
    "projector_width": 32,
    "hidden": [48, 32],
    "decoder_hidden": [32, 48],
    "codebook_size": 8,
    "training": TRAINING,
}
ROUTER = {"hidden": 16}
TOKENIZERS = {
    "adc-sid": config.AdcSid.model_validate({**SMALL, "router": ROUTER, "revival": {"every": 20}}),
    "adc-sid two experts": config.AdcSid.model_validate(
        {**SMALL, "shared_experts": 2, "content_experts": {"text": 2, "visual": 2}, "router": ROUTER, "revival": {"every": 20}}
    ),
}


def train(settings, table, folder, workers=Workers(), epochs=None):
    torch.manual_seed(5)
    data = shard(table, (*settings.content, BEHAVIOR), workers.rank, workers.world)
    training = settings.training if epochs is None else settings.training.model_copy(update={"epochs": epochs})
    loop = TokenizerTraining(artifact.build(settings, data.widths), training, data, folder, 5, workers, "item_features version 0")
    return loop, loop.run()


@pytest.fixture(scope="module", params=TOKENIZERS)
def trained(request, tmp_path_factory):
    table, cluster = catalogue()
    settings = TOKENIZERS[request.param]
    loop, rows = train(settings, table, tmp_path_factory.mktemp("t"))
    return settings, loop, rows, shard(table, (*settings.content, BEHAVIOR)), cluster


def everything(data):
    return data.take(np.arange(len(data)))


def test_shapes_and_ranges(trained):
    _, loop, _, data, _ = trained
    codes, weights, active = loop.tokenizer.encode(everything(data))
    length = len(loop.tokenizer.slots)
    assert codes.shape == weights.shape == active.shape == (len(data), length)
    assert codes.dtype == torch.int32
    for index, slot in enumerate(loop.tokenizer.slots):
        assert ((codes[:, index] == PAD) | ((codes[:, index] >= 0) & (codes[:, index] < slot.size))).all()
    assert (weights >= 0).all()
    assert torch.equal(active, weights > 0)


def test_encoding_depends_on_the_item_alone(trained):
    _, loop, _, data, _ = trained
    whole = loop.tokenizer.encode(everything(data))
    order = np.random.default_rng(0).permutation(len(data))
    shuffled = loop.tokenizer.encode(data.take(order))
    assert torch.equal(whole.codes[order], shuffled.codes)
    single = torch.cat([loop.tokenizer.encode(data.take(np.array([i]))).codes for i in range(0, len(data), 29)])
    assert torch.equal(whole.codes[::29], single)
    assert torch.equal(whole.codes, loop.tokenizer.encode(everything(data)).codes)


def test_the_artifact_gives_the_same_codes_and_refuses_what_does_not_belong(trained, tmp_path):
    settings, loop, _, data, _ = trained
    manifest = artifact.write(tmp_path / "m", loop.tokenizer, settings, {"seed": 5})
    loaded, read = artifact.read(tmp_path / "m")
    assert read == json.loads(json.dumps(manifest))
    for ours, theirs in zip(loop.tokenizer.encode(everything(data)), loaded.encode(everything(data))):
        assert torch.equal(ours, theirs)
    weights = (tmp_path / "m" / "weights.safetensors").read_bytes()
    with pytest.raises(InputError, match="damaged"):
        artifact.decode(manifest, weights[:-1] + bytes([weights[-1] ^ 1]))
    other = {**manifest, "widths": {**manifest["widths"], "text": 5}}
    with pytest.raises(InputError, match="do not fit"):
        artifact.decode(other, weights)
    (tmp_path / "m" / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        artifact.read(tmp_path / "m")
    with pytest.raises(InputError, match="no manifest"):
        artifact.read(tmp_path)


def test_planted_clusters_are_recovered(trained):
    _, loop, _, data, cluster = trained
    codes = loop.tokenizer.encode(everything(data)).codes.numpy()
    best = max(adjusted_rand_score(cluster, codes[:, index]) for index in range(codes.shape[1]))
    assert best > 0.9


def test_no_codebook_dies_and_training_lowers_the_loss(trained):
    _, _, rows, _, _ = trained
    assert rows[-1]["utilisation"] > 0.95
    assert rows[-1]["reconstruction"] < 0.6 * rows[0]["reconstruction"]
    assert rows[-1]["codebook"] < rows[1]["codebook"] * 2
    assert all(rows[-1][f"fvu_{m}"] < 0.7 for m in ("text", "visual"))


def test_items_that_lack_a_modality_encode(trained):
    settings, loop, _, data, _ = trained
    batch = everything(data)
    codes, weights, _ = loop.tokenizer.encode(batch)
    for index, slot in enumerate(loop.tokenizer.slots):
        if slot.kind == "shared":
            assert (codes[:, index] != PAD).all()
            continue
        absent = ~batch.present[slot.kind]
        assert torch.equal(codes[:, index] == PAD, absent)
        assert (weights[absent, index] == 0).all()
    text_only = Batch(batch.vectors, {m: p & (m == "text") for m, p in batch.present.items()}, torch.zeros(len(batch)))
    assert (loop.tokenizer.encode(text_only).codes[:, 0] != PAD).all()


def test_values_behind_an_absent_modality_are_not_read(trained):
    _, loop, _, data, _ = trained
    batch = everything(data)
    dirty = {m: torch.where(batch.present[m][:, None], v, torch.full_like(v, 77.0)) for m, v in batch.vectors.items()}
    assert torch.equal(loop.tokenizer.encode(batch).codes, loop.tokenizer.encode(Batch(dirty, batch.present, batch.richness)).codes)


def test_a_killed_run_resumes_and_ends_as_it_would_have(tmp_path):
    table, _ = catalogue(items=300)
    settings = TOKENIZERS["adc-sid"]
    whole, _ = train(settings, table, tmp_path / "a", epochs=24)

    class Killed(Exception):
        pass

    def kill(rows):
        if len(rows) == 17:
            raise Killed

    data = shard(table)
    torch.manual_seed(5)
    training = settings.training.model_copy(update={"epochs": 24})
    first = TokenizerTraining(artifact.build(settings, data.widths), training, data, tmp_path / "b", 5, Workers(), "v0")
    with pytest.raises(Killed):
        first.run(kill)
    resumed, rows = train(settings, table, tmp_path / "b", epochs=24)
    assert len(rows) == 24
    for name, tensor in whole.tokenizer.state_dict().items():
        assert torch.equal(tensor, resumed.tokenizer.state_dict()[name]), name


def test_the_same_seed_gives_the_same_codes_and_a_non_finite_loss_is_named(tmp_path):
    table, _ = catalogue(items=200)
    settings = TOKENIZERS["adc-sid"]
    one, _ = train(settings, table, tmp_path / "a", epochs=5)
    two, _ = train(settings, table, tmp_path / "b", epochs=5)
    data = shard(table)
    assert torch.equal(one.tokenizer.encode(everything(data)).codes, two.tokenizer.encode(everything(data)).codes)
    broken = TokenizerTraining(
        artifact.build(settings, data.widths), settings.training, data, tmp_path / "c", 5, Workers(), "item_features version 7"
    )
    with torch.no_grad():
        next(broken.tokenizer.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"not finite at step 0 .*item_features version 7"):
        broken.run()


def test_the_gate_reaches_its_sparsity_target_and_the_controller_protects_poor_items(trained):
    settings, loop, rows, data, _ = trained
    assert rows[-1]["sparsity"] == pytest.approx(rows[-1]["sparsity_target"], abs=0.12)
    weights = loop.tokenizer.encode(everything(data)).weights.numpy()
    behavior = [i for i, slot in enumerate(loop.tokenizer.slots) if slot.kind == BEHAVIOR]
    assert (weights[:, behavior] == 0).any()
    facts = loop.tokenizer.facts()
    assert facts["controller"]["alpha"] == settings.controller.alpha
    assert np.isfinite(facts["controller"]["beta"])


def test_reconstruction_gradient_does_not_reach_the_codebooks(trained):
    settings, loop, _, data, _ = trained
    model = loop.tokenizer
    batch = data.take(np.arange(64))
    model.zero_grad()
    x = model._inputs(batch)
    latents, weights, _ = model._experts(x, batch)
    quantized = model.codebooks(latents)
    z, z_q = model._fuse(quantized, weights)
    model._reconstruction(model.decoder(z + (z_q - z).detach()), x, batch).backward()
    assert model.codebooks.weight.grad is None
    model.zero_grad()
    model.losses(batch, Workers()).total.backward()
    assert model.codebooks.weight.grad.abs().sum() > 0


def test_fused_vectors_by_hand(trained):
    _, loop, _, data, _ = trained
    model = loop.tokenizer
    batch = data.take(np.arange(5))
    latents, weights, _ = model._experts(model._inputs(batch), batch)
    quantized = model.codebooks(latents)
    z, z_q = model._fuse(quantized, weights)
    for item in range(5):
        by_hand = sum(weights[slot, item] * quantized.codewords[slot, item] for slot in range(len(model.slots)))
        assert torch.allclose(z_q[item], by_hand, atol=1e-5)
    assert torch.allclose(quantized.latents.norm(dim=2), torch.ones(()), atol=1e-4)
    content = [i for i, slot in enumerate(model.slots) if slot.kind == "text"]
    assert torch.allclose(weights[content].sum(0), torch.ones(5), atol=1e-5), "content gates are a softmax"
    assert z.shape == z_q.shape


def test_tokens_are_readable():
    assert token(Slot("t0", "text", 100), 17) == "<t0_17>"
    assert token(Slot("b2", "behavior", 100), PAD) == "<b2_pad>"
