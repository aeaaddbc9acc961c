"""Test every tokenizer with one behavioural suite: to add one, add a line to SECTIONS."""

import json
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from adasid import config, tables
from adasid.data.shards import Shard
from adasid.distributed import Workers
from adasid.errors import ConfigError, InputError, TrainingError
from adasid.quantizers.experts import Quantized
from adasid.sid import PreviousCodes, Slot, token
from adasid.tables import BEHAVIOR, PAD
from adasid.tokenizers import artifact
from adasid.tokenizers.base import sample
from adasid.training.tokenizer import TokenizerTraining
from tests.planted import catalogue, shard

TRAINING = {"epochs": 80, "batch": 128, "lr": 0.003, "log_epochs": 1, "checkpoint_epochs": 10}
SMALL = {"codebook_size": 8, "revival": {"every": 20}, "training": TRAINING}
MIXTURE = {**SMALL, "latent_width": 16, "projector_width": 32, "hidden": [48, 32], "decoder_hidden": [32, 48]}
RESIDUAL = {**SMALL, "latent_width": 8, "hidden": [48, 32], "levels": 3}
EACH = {"text": 2, "visual": 1, "behavior": 1}
PUBLISHED = {
    **{"start": "random", "distance": "cosine", "damping": 0.0, "count_power": 0.0, "behavior_experts": 3},
    "expert_lr": 1.0,
    "revival": {"every": 20, "min_share": 0.25},
}
SECTIONS = {
    "adc-sid": {"name": "adc-sid", **MIXTURE, "router": {"hidden": 16}},
    "adc-sid two experts": {
        **{"name": "adc-sid", **MIXTURE, "router": {"hidden": 16}},
        **{**PUBLISHED, "shared_experts": 2, "content_experts": {"text": 2, "visual": 2}},
    },
    "adc-sid without its parts": {
        **{"name": "adc-sid", **MIXTURE, "router": {"gate": "equal"}},
        **{"controller": {"enabled": False}, "alignment_weight": 0.0},
    },
    "adc-sid switch": {
        **{"name": "adc-sid", **MIXTURE, **PUBLISHED, "shared_experts": 1},
        **{"router": {"hidden": 16, "gate": "switch"}, "straight_through": "sum"},
    },
    "adc-sid from axes": {
        **{"name": "adc-sid", **MIXTURE, "router": {"hidden": 16}, "start": "axes", "distance": "euclidean"},
        **{"shared_experts": 2, "content_experts": {"text": 2, "visual": 1}, "damping": 0.5, "count_power": 0.5},
    },
    "adc-sid fixed": {
        **{"name": "adc-sid", **MIXTURE, "router": {"hidden": 16}, "start": "axes", "experts": "fixed"},
        **{"codebooks": "fixed", "distance": "cosine", "damping": 0.5, "shared_experts": 2},
    },
    "ada-sid": {
        **{"name": "ada-sid", **MIXTURE, "router": {"hidden": 16, "sparsity": 0.4, "item_weight": 0.1}},
        "behavior_experts": 4,
    },
    "rq-vae": {"name": "rq-vae", **RESIDUAL},
    "quasid": {"name": "quasid", **RESIDUAL},
    "adasid": {"name": "adasid", **RESIDUAL},
    "letter": {"name": "letter", **RESIDUAL, "diversity_groups": 3},
    "das": {"name": "das", **RESIDUAL},
    "rq-vae++": {"name": "rq-vae++", **RESIDUAL, "levels": EACH},
    "mm-rq-vae": {"name": "mm-rq-vae", **RESIDUAL, "levels": EACH},
    "rq-kmeans": {"name": "rq-kmeans", "codebook_size": 8, "levels": 3},
    "rq-kmeans balanced": {"name": "rq-kmeans", "codebook_size": 8, "levels": 3, "balanced": True},
    "rq-kmeans by modality": {"name": "rq-kmeans", "codebook_size": 8, "levels": EACH},
    "rq-kmeans shared, soft": {
        **{"name": "rq-kmeans", "codebook_size": 8, "levels": {"shared": 2, **EACH}},
        **{"damping": 0.5, "count_power": 0.5},
    },
    "rq-kmeans aligned": {
        **{"name": "rq-kmeans", "codebook_size": 8, "levels": 2},
        "aligner": {"width": 8, "hidden": [32], "training": {**TRAINING, "epochs": 40}},
    },
    "opq": {"name": "opq", "codebook_size": 8, "levels": 2, "width": 8},
    "opq by modality": {"name": "opq", "codebook_size": 8, "levels": EACH, "width": 8},
    "item-id": {"name": "item-id", "codebook_size": 8},
    "random": {"name": "random", "codebook_size": 8, "levels": 3},
}
TOKENIZERS = {label: artifact.settings_of(section) for label, section in SECTIONS.items()}
CONTROLS = ("item-id", "random")


def data_of(settings, table, cluster, workers=Workers()):
    return shard(table, settings.inputs, workers.rank, workers.world, cluster if settings.pairs else None)


def train(settings, catalogue, folder, workers=Workers()):
    torch.manual_seed(5)
    data = data_of(settings, *catalogue, workers)
    loop = TokenizerTraining(
        artifact.build(settings, data.widths), settings, data, folder, 5, workers, "item_features version 0"
    )
    return loop, loop.run()


@cache
def run_of(name):
    """One of the suite, trained on the whole planted catalogue."""
    table, cluster = catalogue()
    with tempfile.TemporaryDirectory() as folder:
        loop, rows = train(TOKENIZERS[name], (table, cluster), Path(folder))
    return TOKENIZERS[name], loop, rows, loop.shard, cluster


@pytest.fixture(scope="module", params=TOKENIZERS)
def trained(request):
    return run_of(request.param)


def test_every_tokenizer_of_the_list_is_in_the_suite():
    assert {settings.name for settings in TOKENIZERS.values()} == {model().name for model in config.TOKENIZERS}


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


def test_a_published_code_stays_within_the_slack(trained):
    settings, loop, _, data, _ = trained
    batch, sizes = everything(data), torch.tensor([slot.size for slot in loop.tokenizer.slots])
    own = loop.tokenizer.encode(batch).codes.long()
    other = torch.where(own == PAD, PAD, (own + 1) % sizes)
    at_will = loop.tokenizer.encode(replace(batch, previous=PreviousCodes(other, 1e9))).codes
    assert torch.equal(loop.tokenizer.encode(replace(batch, previous=PreviousCodes(own, 0.0))).codes.long(), own)
    assert torch.equal(
        at_will.long(), own if settings.name in CONTROLS else other
    )  # a control's codes do not follow from vectors
    nothing = torch.full_like(own, PAD)
    assert torch.equal(loop.tokenizer.encode(replace(batch, previous=PreviousCodes(nothing, 1e9))).codes.long(), own)


def test_the_artifact_gives_the_same_codes_and_refuses_what_does_not_belong(trained, tmp_path):
    settings, loop, _, data, _ = trained
    manifest = artifact.write(tmp_path / "m", loop.tokenizer, settings, {"seed": 5})
    loaded, read = artifact.read(tmp_path / "m")
    assert read == manifest
    for ours, theirs in zip(loop.tokenizer.encode(everything(data)), loaded.encode(everything(data))):
        assert torch.equal(ours, theirs)
    weights = (tmp_path / "m" / "weights.safetensors").read_bytes()
    with pytest.raises(InputError, match="damaged"):
        artifact.decode(manifest, weights[:-1] + bytes([weights[-1] ^ 1]))
    other = manifest.model_copy(update={"widths": {m: 5 for m in manifest.widths}})
    if manifest.widths:
        with pytest.raises(InputError, match="do not fit"):
            artifact.decode(other, weights)
    (tmp_path / "m" / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        artifact.read(tmp_path / "m")
    with pytest.raises(InputError, match="no manifest"):
        artifact.read(tmp_path)


def test_planted_clusters_are_recovered(trained):
    settings, loop, _, data, cluster = trained
    codes = loop.tokenizer.encode(everything(data)).codes.numpy()
    best = max(adjusted_rand_score(cluster, codes[:, index]) for index in range(codes.shape[1]))
    if settings.name in CONTROLS:
        assert best < 0.1
    else:
        # as many codes as clusters: a k-means start that merges two of them comes to .81; OPQ spreads clusters over its
        # slots
        assert best > {"opq": 0.5, "das": 0.8, "rq-vae++": 0.8, "mm-rq-vae": 0.8}.get(settings.name, 0.9)


def test_no_codebook_dies_and_training_lowers_the_loss(trained):
    settings, loop, rows, data, _ = trained
    if settings.name == "item-id":
        codes = loop.tokenizer.encode(everything(data)).codes
        assert len(torch.unique(codes, dim=0)) == len(data)
        return
    revival = getattr(settings, "revival", None)
    assert rows[-1]["utilisation"] > (0.9 if revival and not revival.min_share else 0.95)
    if settings.name == "random":
        return
    if settings.epochs and "reconstruction" in rows[0]:
        warm = 0.9 if settings.name == "mm-rq-vae" else 0.6
        assert rows[-1]["reconstruction"] < warm * rows[0]["reconstruction"]
        if isinstance(settings, config.AdcSidSettings):
            assert rows[-1]["codebook"] < rows[1]["codebook"] * 2
    elif settings.epochs:
        assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
        return
    if settings.name == "mm-rq-vae":  # matches the distribution of a batch, not its items
        return
    bound = {"opq": 0.9}.get(settings.name, 0.75)
    assert all(rows[-1][f"fvu_{m}"] < bound for m in settings.inputs if m != BEHAVIOR)


def test_what_is_learned_from_pairs_and_overlaps_is_in_the_log(trained):
    settings, _, rows, _, _ = trained
    assert ("contrast" in rows[-1]) == (getattr(settings, "contrast", None) is not None)
    assert ("repulsion" in rows[-1]) == (getattr(settings, "repulsion", None) is not None)


def test_items_that_lack_a_modality_encode(trained):
    settings, loop, _, data, _ = trained
    batch = everything(data)
    codes, weights, _ = loop.tokenizer.encode(batch)
    for index, slot in enumerate(loop.tokenizer.slots):
        if slot.kind == "shared":
            assert (codes[:, index] != PAD).all()
            continue
        absent = ~batch.present[slot.kind]
        assert (codes[absent, index] == PAD).all()
        assert (weights[absent, index] == 0).all()
        if not (settings.name == "ada-sid" and slot.kind == BEHAVIOR):
            assert (codes[~absent, index] != PAD).all()
    text_only = replace(
        batch, present={m: p & (m == "text") for m, p in batch.present.items()}, richness=torch.zeros(len(batch))
    )
    assert (loop.tokenizer.encode(text_only).codes[:, 0] != PAD).all()


def test_only_the_declared_inputs_are_read(trained):
    settings, loop, _, data, _ = trained
    batch = everything(data)
    assert set(loop.tokenizer.widths) == set(settings.inputs) == set(batch.vectors)
    dirty = {m: torch.where(batch.present[m][:, None], v, torch.full_like(v, 77.0)) for m, v in batch.vectors.items()}
    more = replace(
        batch,
        vectors={**dirty, "audio": torch.ones(len(batch), 3)},
        present={**batch.present, "audio": batch.index > 0},
    )
    assert torch.equal(loop.tokenizer.encode(batch).codes, loop.tokenizer.encode(more).codes)
    if settings.name not in CONTROLS:
        other = replace(batch, index=batch.index + 1)
        assert torch.equal(loop.tokenizer.encode(batch).codes, loop.tokenizer.encode(other).codes)


@pytest.mark.parametrize("name", ["adc-sid", "ada-sid", "rq-vae", "letter", "mm-rq-vae"])
def test_a_retrained_tokenizer_preserves_published_codes(name, tmp_path):
    settings, loop, _, data, _ = run_of(name)
    settings = settings.model_copy(update={"training": settings.training.model_copy(update={"epochs": 30})})
    published = loop.tokenizer.encode(everything(data)).codes
    kept = {}
    for hold in (True, False):
        shard = data_of(settings, *catalogue())
        if hold:
            index, codes = pa.array(shard.item_index[::-1]), pa.array(published.flip(0).tolist(), pa.list_(pa.int32()))
            shard.hold([pa.record_batch({"item_index": index, "codes": codes})], published.shape[1], 0.5)
        torch.manual_seed(6)
        anew = TokenizerTraining(
            artifact.build(settings, shard.widths), settings, shard, tmp_path / str(hold), 6, Workers(), "v1"
        )
        quality = anew.run()[-1]
        codes = anew.tokenizer.encode(replace(everything(data), previous=PreviousCodes(published.long(), 0.5))).codes
        kept[hold] = (codes == published)[published != PAD].double().mean().item(), quality["fvu_text"]
    (held, error), (free, least) = kept[True], kept[False]
    assert held > 0.6 and free < 0.4
    assert error < 1.3 * least


KILLED = [
    name
    for name, settings in TOKENIZERS.items()
    if settings.epochs and name in {"adc-sid", "adasid", "letter", "rq-kmeans aligned"}
]


@pytest.mark.parametrize("name", KILLED)
def test_a_killed_run_resumes_and_ends_as_it_would_have(name, tmp_path):
    planted = catalogue(items=300)
    settings = TOKENIZERS[name]
    training = settings.epochs.model_copy(update={"epochs": 24})
    change = (
        {"aligner": settings.aligner.model_copy(update={"training": training})}
        if name == "rq-kmeans aligned"
        else {"training": training}
    )
    settings = settings.model_copy(update=change)
    whole, _ = train(settings, planted, tmp_path / "a")

    class Killed(Exception):
        pass

    def kill(rows):
        if len(rows) == 17:
            raise Killed

    torch.manual_seed(5)
    data = data_of(settings, *planted)
    first = TokenizerTraining(artifact.build(settings, data.widths), settings, data, tmp_path / "b", 5, Workers(), "v0")
    with pytest.raises(Killed):
        first.run(kill)
    resumed, rows = train(settings, planted, tmp_path / "b")
    assert len(rows) == 24
    for key, tensor in whole.tokenizer.state_dict().items():
        assert torch.equal(tensor, resumed.tokenizer.state_dict()[key]), key


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if " " not in name])
def test_the_same_seed_gives_the_same_codes(name, tmp_path):
    planted, settings = catalogue(items=200), TOKENIZERS[name]
    if settings.epochs:
        settings = settings.model_copy(update={"training": settings.training.model_copy(update={"epochs": 5})})
    one, _ = train(settings, planted, tmp_path / "a")
    two, _ = train(settings, planted, tmp_path / "b")
    batch = everything(data_of(settings, *planted))
    assert torch.equal(one.tokenizer.encode(batch).codes, two.tokenizer.encode(batch).codes)


@pytest.mark.parametrize("name", ["adc-sid from axes", "mm-rq-vae", "rq-kmeans shared, soft", "opq by modality"])
def test_a_modality_that_few_items_have_is_fitted_to_these_items(name, tmp_path):
    table, cluster = catalogue()
    few = [row if index in (101, 305, 477) else None for index, row in enumerate(table["visual"].to_pylist())]
    rare = table.set_column(table.column_names.index("visual"), "visual", pa.array(few, tables.VECTOR))
    samples = {key: 50 for key in ("kmeans_samples", "fit_samples") if key in type(TOKENIZERS[name]).model_fields}
    settings = TOKENIZERS[name].model_copy(update=samples)
    if settings.epochs:
        training = settings.training.model_copy(update={"epochs": 3})
        settings = settings.model_copy(update={"training": training})
    loop, _ = train(settings, (rare, cluster), tmp_path)
    batch = everything(loop.shard)
    codes = loop.tokenizer.encode(batch).codes
    slots = [index for index, slot in enumerate(loop.tokenizer.slots) if slot.kind == "visual"]
    assert len(codes[batch.present["visual"]][:, slots].unique(dim=0)) == 3, "each of the three has a code of its own"


def test_a_sample_has_items_of_each_modality():
    data = shard(catalogue()[0])
    lacking = np.setdiff1d(np.arange(600), data.having(BEHAVIOR))
    assert lacking.tolist() == list(range(540, 600))
    (batch,) = sample(data, Workers(), 40, BEHAVIOR)
    assert len(batch) == 40 and batch.present[BEHAVIOR].all()
    (every,) = sample(data, Workers(), 40)
    assert len(every) == 40 and not every.present[BEHAVIOR].all()
    table = catalogue()[0]
    late = Shard(
        lambda columns: table.slice(545).select(columns).to_batches(),
        ("text", BEHAVIOR),
        everyone=lambda columns: table.select(columns).to_batches(),
    )
    assert len(next(sample(late, Workers(), 40, "text"))) == 40
    (empty,) = sample(late, Workers(), 40, BEHAVIOR)
    assert not empty.present[BEHAVIOR].any(), "a worker without such items yields another one"


def test_a_warm_run_restarts_no_schedule_and_replaces_no_code(tmp_path, monkeypatch):
    loop, _ = train(TOKENIZERS["adasid"], catalogue(), tmp_path)
    tokenizer, seen, losses = loop.tokenizer, [], loop.tokenizer.losses
    tokenizer.unfreeze()
    monkeypatch.setattr(tokenizer, "losses", lambda *args: seen.append(args[2]) or losses(*args))
    monkeypatch.setattr(tokenizer, "after_step", None)
    TokenizerTraining(
        tokenizer, TOKENIZERS["adasid"], loop.shard, tmp_path / "warm", 5, Workers(), "v", warm=config.Warm(epochs=2)
    ).run()
    assert len(seen) > 1 and set(seen) == {1.0}


def test_fixed_codebooks_stay_fixed_in_a_warm_run_too(tmp_path):
    table = catalogue()
    loop, _ = train(TOKENIZERS["adc-sid fixed"], table, tmp_path)
    artifact.write(tmp_path / "model", loop.tokenizer, TOKENIZERS["adc-sid fixed"], {})
    tokenizer, _ = artifact.read(tmp_path / "model")
    before = tokenizer.codebooks.weight.clone()
    tokenizer.unfreeze()
    assert {name for name, p in tokenizer.named_parameters() if not p.requires_grad} == {"codebooks.weight"}
    warm = config.Warm(epochs=2)
    TokenizerTraining(
        tokenizer, TOKENIZERS["adc-sid fixed"], loop.shard, tmp_path / "warm", 5, Workers(), "v1", warm=warm
    ).run()
    assert torch.equal(tokenizer.codebooks.weight, before)


def test_shared_codebooks_start_from_a_sample_of_all_items(monkeypatch):
    """And not from more of the items that have a modality that few have."""
    settings = TOKENIZERS["adc-sid from axes"].model_copy(update={"kmeans_samples": 100})
    data = data_of(settings, *catalogue())
    tokenizer = artifact.build(settings, data.widths)
    tokenizer.prepare(data, Workers())
    given = {}
    monkeypatch.setattr(tokenizer.codebooks, "initialise", lambda *args: given.update(active=args[1]))
    tokenizer.start_quantizing(data, Workers(), torch.Generator())
    rows = dict(zip([slot.name for slot in tokenizer.slots], given["active"].sum(1).tolist()))
    assert rows == dict.fromkeys(rows, 100)
    both = given["active"][[slot.kind == BEHAVIOR for slot in tokenizer.slots]][0] & given["active"][0]
    assert both.sum() < 100


def test_a_short_training_has_checkpoints(tmp_path):
    settings = config.AdcSidSettings(content_experts={"text": 1, "visual": 1})
    data = data_of(settings, *catalogue())
    loop = TokenizerTraining(artifact.build(settings, data.widths), settings, data, tmp_path, 5, Workers(), "v")
    assert settings.training.epochs == 10 and (loop.log_epochs, loop.checkpoint_epochs) == (2, 2)


def test_experts_and_codebooks_learn_at_their_share_of_the_learning_rate(tmp_path):
    settings = TOKENIZERS["adc-sid from axes"].model_copy(update={"expert_lr": 0.0})
    settings = settings.model_copy(update={"training": settings.training.model_copy(update={"epochs": 2})})
    data = data_of(settings, *catalogue())
    tokenizer = artifact.build(settings, data.widths)
    loop = TokenizerTraining(tokenizer, settings, data, tmp_path, 5, Workers(), "v")
    slow = {id(p) for p in tokenizer.learning_rates()}
    groups = loop.optimizers["optimizer"].param_groups
    assert {(group["factor"], group["weight_decay"] > 0) for group in groups} >= {(0.0, True), (1.0, True)}
    assert all((id(p) in slow) == (group["factor"] == 0) for group in groups for p in group["params"])
    before = {name: p.detach().clone() for name, p in tokenizer.named_parameters()}
    loop.run()
    moved = {name for name, p in tokenizer.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in moved if ".rest." in name or name.startswith("shared.")} == set()
    assert {"trunks.behavior.heads.1.weight", "trunks.text.first.weight", "decoder.0.weight"} <= moved


def test_before_codebooks_exist_latents_are_not_quantized():
    settings = TOKENIZERS["adc-sid from axes"]
    data = data_of(settings, *catalogue())
    torch.manual_seed(0)
    tokenizer = artifact.build(settings, data.widths)
    tokenizer.prepare(data, Workers())
    tokenizer.eval().requires_grad_(False)
    losses = []
    for scale in (1.0, 50.0):
        tokenizer.codebooks.weight.mul_(scale)
        losses.append(float(tokenizer.losses(everything(data), Workers(), 0.0).total))
    assert losses[0] == losses[1]


def test_an_artifact_of_before_start_and_damping_reads_as_it_was_trained(tmp_path):
    settings = TOKENIZERS["adc-sid two experts"]
    loop, _ = train(
        settings.model_copy(update={"training": settings.training.model_copy(update={"epochs": 3})}),
        catalogue(),
        tmp_path / "run",
    )
    artifact.write(tmp_path / "model", loop.tokenizer, settings, {})
    entries = json.loads((tmp_path / "model" / "manifest.json").read_text())
    for key in ("start", "experts", "content_weight", "distance", "damping", "count_power", "codebooks", "expert_lr"):
        del entries["config"][key]
    (tmp_path / "model" / "manifest.json").write_text(json.dumps(entries))
    tokenizer, manifest = artifact.read(tmp_path / "model")
    batch = everything(loop.shard)
    assert torch.equal(tokenizer.encode(batch).codes, loop.tokenizer.encode(batch).codes)
    assert artifact.settings_of(manifest.config).parallel
    entries["config"]["distance"] = "manhattan"
    (tmp_path / "model" / "manifest.json").write_text(json.dumps(entries))
    with pytest.raises(InputError, match=r"config is of another version of adasid \(distance: Input should be"):
        artifact.read(tmp_path / "model")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "opq", "engine": "faiss", "codebook_size": 16, "count_power": 0.5}, "weighs all items alike"),
        ({"name": "adc-sid", "codebooks": "fixed", "revival": {"min_share": 0.1}}, "no code is revived"),
    ],
)
def test_settings_that_would_have_no_effect_are_refused(section, message):
    with pytest.raises(ConfigError, match=message):
        config.build({"features": {"content": ["text"]}, "tokenizer": section})


def test_a_non_finite_loss_is_named(tmp_path):
    settings = TOKENIZERS["adc-sid"]
    data = data_of(settings, *catalogue(items=200))
    broken = TokenizerTraining(
        artifact.build(settings, data.widths), settings, data, tmp_path / "c", 5, Workers(), "item_features version 7"
    )
    with torch.no_grad():
        next(broken.tokenizer.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"not finite at step 0 .*item_features version 7"):
        broken.run()


GATED = pytest.mark.parametrize("name", ["adc-sid", "adc-sid two experts", "ada-sid"])


@GATED
def test_the_gate_reaches_its_sparsity_target_and_so_says_the_log(name):
    settings, loop, rows, data, _ = run_of(name)
    assert rows[-1]["sparsity"] == pytest.approx(rows[-1]["sparsity_target"], abs=0.12)
    codes, weights, active = loop.tokenizer.encode(everything(data))
    behavior = [i for i, slot in enumerate(loop.tokenizer.slots) if slot.kind == BEHAVIOR]
    off = weights[:, behavior] == 0
    assert off.any()
    assert (active[:, behavior] == ~off).all()
    if name == "ada-sid":
        assert torch.equal(off, codes[:, behavior] == PAD), "an inactive slot is PAD"
    facts = loop.tokenizer.facts()
    assert facts["controller"]["alpha"] == settings.controller.alpha
    assert np.isfinite(facts["controller"]["beta"])


def test_without_its_gate_every_behaviour_slot_has_weight_one():
    _, loop, rows, data, _ = run_of("adc-sid without its parts")
    codes, weights, _ = loop.tokenizer.encode(everything(data))
    assert torch.equal(weights, (codes != PAD).float())
    assert not {"alignment", "sparsity", "lambda"} & set(rows[-1])


def test_reconstruction_gradient_does_not_reach_the_codebooks():
    _, loop, _, data, _ = run_of("adc-sid")
    model = loop.tokenizer
    batch = data.take(np.arange(64))
    model.zero_grad()
    x = model.inputs(batch)
    latents, weights, _ = model._experts(x, batch)
    quantized = model.codebooks(latents)
    z, z_q = model._fuse(quantized, weights)
    model._reconstruction(model.decoder(z + (z_q - z).detach()), x, batch).backward()
    assert model.codebooks.weight.grad is None
    model.zero_grad()
    model.losses(batch, Workers(), 0.5).total.backward()
    assert model.codebooks.weight.grad.abs().sum() > 0


def test_residual_reconstruction_gradient_passes_straight_through():
    _, loop, _, data, _ = run_of("rq-vae")
    model = loop.tokenizer
    batch = data.take(np.arange(64))
    model.zero_grad()
    x = model.inputs(batch)
    model.reconstruction(model.passed(x, batch), x, batch).backward()
    assert model.tower("shared").codebooks.weight.grad is None
    assert all(
        p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "encoder" in name and name.endswith("weight")
    )


def test_fused_vectors_by_hand():
    _, loop, _, data, _ = run_of("adc-sid two experts")
    model = loop.tokenizer
    batch = data.take(np.arange(5))
    latents, weights, _ = model._experts(model.inputs(batch), batch)
    quantized = model.codebooks(latents)
    z, z_q = model._fuse(quantized, weights)
    for item in range(5):
        by_hand = sum(weights[slot, item] * quantized.codewords[slot, item] for slot in range(len(model.slots)))
        assert torch.allclose(z_q[item], by_hand, atol=1e-5)
    assert torch.allclose(quantized.latents.norm(dim=2), torch.ones(()), atol=1e-4)
    content = [i for i, slot in enumerate(model.slots) if slot.kind == "text"]
    assert torch.allclose(weights[content].sum(0), torch.ones(5), atol=1e-5), "content gates are a softmax"
    assert z.shape == z_q.shape


def test_gates_learn_by_the_codewords_they_weigh_or_as_the_paper_has_it_by_latents(monkeypatch):
    _, loop, _, data, _ = run_of("adc-sid")
    model, batch = loop.tokenizer, data.take(np.arange(64))
    latents, found, _ = model._experts(model.inputs(batch), batch)
    codes, units, codewords = model.codebooks(latents)
    codewords = codewords.detach().requires_grad_()
    upstream = torch.randn(64, units.shape[2], generator=torch.Generator().manual_seed(5))
    for way, learnt_by in (("slots", codewords), ("sum", units)):
        monkeypatch.setattr(model, "settings", model.settings.model_copy(update={"straight_through": way}))
        weights, ours = found.detach().requires_grad_(), units.detach().requires_grad_()
        passed = model._straight_through(Quantized(codes, ours, codewords), weights)
        assert torch.allclose(passed, torch.einsum("lb,lbd->bd", weights, codewords), atol=1e-5)
        passed.backward(upstream)
        assert torch.allclose(weights.grad, torch.einsum("bd,lbd->lb", upstream, learnt_by), atol=1e-5)
        assert torch.allclose(ours.grad, weights.detach()[:, :, None] * upstream, atol=1e-5)
    assert codewords.grad is None, "codebooks learn nothing from the reconstruction"


def test_of_a_switch_active_slots_count_alike_and_their_weights_learn_up_to_one():
    _, loop, _, data, _ = run_of("adc-sid switch")
    model, batch = loop.tokenizer, data.take(np.arange(64))
    latents, found, _ = model._experts(model.inputs(batch), batch)
    quantized = model.codebooks(latents)
    behavior = torch.tensor([slot.kind == BEHAVIOR for slot in model.slots])
    weights = found.detach().requires_grad_()
    assert (weights[behavior] == 0).any() and ((weights[behavior] > 0) & (weights[behavior] < 1)).any()
    z, z_q = model._fuse(quantized, weights)
    counts = torch.where(behavior[:, None], (weights > 0).float(), weights)
    assert torch.allclose(z_q, torch.einsum("lb,lbd->bd", counts, quantized.codewords), atol=1e-5)
    z.sum().backward()
    free = (~behavior)[:, None] | (weights <= 1)
    assert torch.allclose(weights.grad, quantized.latents.sum(2) * free, atol=1e-5)


def test_tokens_are_readable():
    assert token(Slot("t0", "text", 100), 17) == "<t0_17>"
    assert token(Slot("b2", "behavior", 100), PAD) == "<b2_pad>"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_fewer_items_than_codes(name, tmp_path):
    few = {"codebook_size": 100}
    if TOKENIZERS[name].epochs:
        few["training"] = TOKENIZERS[name].epochs.model_copy(update={"epochs": 2, "batch": 16})
    settings = TOKENIZERS[name].model_copy(
        update={key: value for key, value in few.items() if hasattr(TOKENIZERS[name], key)}
    )
    loop, rows = train(settings, catalogue(items=30), tmp_path)
    codes = loop.tokenizer.encode(everything(loop.shard)).codes
    assert (
        codes.shape == (30, len(loop.tokenizer.slots))
        and codes.max() < 100
        and np.isfinite(list(rows[-1].values())).all()
    )
    decoded = loop.tokenizer.reconstruct(everything(loop.shard))
    assert all(vectors.isfinite().all() for vectors in decoded.values())
    loop.tokenizer.refine(loop.shard, Workers(), 2, torch.Generator().manual_seed(0))
    again = loop.tokenizer.encode(everything(loop.shard)).codes
    assert ((again >= PAD) & (again < 100)).all()
