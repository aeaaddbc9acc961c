"""The card of a tokenizer says what its manifest says, and what its figures say against it."""

import json

import adasid
from adasid.report import card
from adasid.tokenizers import artifact
from tests.planted import catalogue


def manifest(tmp_path, **changes):
    rows, _ = catalogue(200)
    adasid.fit("rq-kmeans", rows.select(["text"]), codebook_size=8, levels=2, progress=False).save(tmp_path / "model")
    known = artifact.read_manifest(tmp_path / "model")
    return known.model_copy(update=changes)


def test_a_card_has_data_codebooks_metrics_and_config(tmp_path):
    known = manifest(tmp_path, inputs={"item_features": 3})
    encoder = {"modality": "text", "identity": json.dumps({"kind": "tf-idf", "digest": "0123456789abcdef"})}
    text = card.render(known, [encoder])
    use = known.metrics["slots"][known.slots[0].name]
    assert 0 < use["utilisation"] <= 1 and 0 <= use["entropy"] <= 2.08
    for expected in (
        f"# Tokenizer {known.digest}",
        f"- text: vectors of {known.widths['text']} values, of tf-idf 0123456789ab",
        "- table `item_features` at version 3",
        f"| {known.slots[1].name} | {known.slots[1].kind} | 8 |",
        f"- fraction of variance unexplained, text: {known.metrics['fvu']['text']:.3f}",
        '"codebook_size": 8',
    ):
        assert expected in text
    assert "**" not in text


def test_a_card_says_what_speaks_against_the_tokenizer(tmp_path):
    poor = {"fvu": {"text": 1.02}, "least_active": 0.0, "slots": {"t0": {"utilisation": 0.2, "entropy": 0.5}}}
    text = card.render(manifest(tmp_path, metrics=poor))
    for expected in ("explains nothing of text", "switched off", "Less than half of the codes are in use** in t0"):
        assert expected in text
