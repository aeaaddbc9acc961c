"""Write the card of a trained tokenizer: one page of Markdown with what it is, what it was trained on, how well it
does, and its limits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from adasid.report.words import DASH, count, number, seconds, share
from adasid.tokenizers.artifact import Manifest, settings_of

_LIMITS = (
    "It reads vectors of these widths only, of the same encoders; vectors of other encoders give SIDs without meaning.",
    "Its codes mean nothing to another tokenizer: where it replaces one, all SIDs move, unless "
    "`retokenize.policy: refit` or `warm` has matched them.",
    "An item without a modality has PAD (-1) in the slots of that modality.",
    "Quality on your task is not measured here: run `jobs/evaluate.py` against simpler tokenizers.",
)
_LEAST_ACTIVE, _LEAST_USED = 0.001, 0.5
"""A behaviour slot that is on for a smaller share of items is off; a codebook of which a smaller share is used is
named."""


def render(manifest: Manifest, encoders: Sequence[Mapping[str, Any]] = ()) -> str:
    """Return the card of an artifact. ``encoders``: rows of ``content_encoders`` of the vectors that it was trained
    on."""
    facts = manifest.model_dump()
    return "\n".join(
        [
            f"# Tokenizer {manifest.digest}",
            "",
            f"{manifest.tokenizer}, {len(manifest.slots)} codes an item, {count(manifest.parameters)} parameters"
            + (f", of run {facts['run']}" if facts.get("run") else "")
            + ".",
            "",
            "## Data",
            "",
            *_data(manifest, facts, encoders),
            "",
            "## Codebooks",
            "",
            *_codebooks(manifest),
            "",
            "## Metrics",
            "",
            *_metrics(manifest),
            "",
            "## Limits",
            "",
            *(f"- {line}" for line in (*_found(manifest), *_LIMITS)),
            "",
            "## Config",
            "",
            *_config(manifest),
            "",
        ]
    )


def _data(manifest: Manifest, facts: Mapping[str, Any], encoders: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    of = {row["modality"]: json.loads(row["identity"]) for row in encoders}
    for modality, width in manifest.widths.items():
        identity = of.get(modality)
        made = f", of {_model(identity)}" if identity else ""
        yield f"- {modality}: vectors of {width} values{made}"
    for table, version in manifest.inputs.items():
        yield f"- table `{table}` at version {version}"
    yield f"- seed {facts.get('seed', DASH)}, trained in {seconds(manifest.seconds)}"
    if versions := facts.get("versions"):
        yield "- " + ", ".join(f"{name} {version}" for name, version in versions.items())


def _model(identity: Mapping[str, Any]) -> str:
    """Return the name of an encoder, or its kind, with its revision or the start of its digest."""
    mark = identity.get("revision") or str(identity.get("digest", ""))[:12]
    return f"{identity.get('model') or identity.get('kind')} {mark}".strip()


def _codebooks(manifest: Manifest) -> Iterator[str]:
    yield "| slot | of | codes | in use | entropy, nats |"
    yield "|---|---|---|---|---|"
    use = manifest.metrics.get("slots", {})
    for slot in manifest.slots:
        found = use.get(slot.name, {})
        used, entropy = share(found.get("utilisation")), number(found.get("entropy"), 2)
        yield f"| {slot.name} | {slot.kind} | {slot.size} | {used} | {entropy} |"


def _metrics(manifest: Manifest) -> Iterator[str]:
    for modality, value in manifest.metrics.get("fvu", {}).items():
        yield f"- fraction of variance unexplained, {modality}: {number(value)}"
    for name in ("reconstruction", "utilisation", "entropy", "sparsity"):
        if name in manifest.metrics:
            yield f"- {name}: {number(manifest.metrics[name])}"


def _found(manifest: Manifest) -> Iterator[str]:
    """Yield what the figures say against this tokenizer."""
    metrics = manifest.metrics
    for modality, value in metrics.get("fvu", {}).items():
        if value >= 1:
            yield f"**It explains nothing of {modality}**: the mean vector would do as well (FVU {number(value)})."
    if metrics.get("least_active", 1.0) < _LEAST_ACTIVE:
        yield "**A behaviour slot is switched off for all items.**"
    low = [name for name, found in metrics.get("slots", {}).items() if found["utilisation"] < _LEAST_USED]
    if low:
        yield f"**Less than half of the codes are in use** in {', '.join(low)}."


def _config(manifest: Manifest) -> Iterator[str]:
    """Yield the settings that differ from the method's defaults."""
    defaults = type(settings_of(manifest.config))().model_dump(mode="json")
    changed = {name: value for name, value in manifest.config.items() if value != defaults.get(name)}
    if not changed:
        yield f"All settings are the defaults of {manifest.tokenizer}."
        return
    yield f"What differs from the defaults of {manifest.tokenizer}:"
    yield ""
    yield from ("```json", json.dumps(changed, indent=1), "```")
