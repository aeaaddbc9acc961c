"""Train a new tokenizer in a nightly run: continue the live one (``warm``), or retrain on previous codes and match
codes and slots with them (``refit``)."""

from __future__ import annotations

import numpy as np
from pyspark.sql import functions as F

from adasid import tables
from adasid.config import TrainedSettings, digest
from adasid.files import Location, write_json
from adasid.tokenizers import artifact
from adasid.tokenizers.artifact import Manifest
from adasid.tokenizers.relabel import Relabelled
from pipelines.engines import spark as engine
from pipelines.features import items, layout, pairs
from pipelines.nightly.nightly_run import NightlyRun
from pipelines.publish import drift
from pipelines.publish.encode import encode
from pipelines.run import Run
from pipelines.training.payload import PreviousTable
from pipelines.training.tokenizer import train


def fit(nightly: NightlyRun, policy: str, live: Location) -> tuple[Location, Manifest]:
    """Return the artifact of policy ``warm`` or ``refit`` on the current features, and its manifest. ``live``: the
    artifact of the live SIDs."""
    cfg, lake = nightly.cfg, nightly.lake
    settings = cfg.retokenize.warm if policy == "warm" else cfg.retokenize.refit_slack
    hashes = lake.input_hashes({"item_features": nightly.version})
    key = digest(policy, nightly.live.tokenizer, nightly.live.generation, cfg.tokenizer, settings, cfg.seed, hashes)
    folder = Run(cfg).artifact("tokenizer", key)
    if policy == "warm":
        return folder / "model", _trained(nightly, folder, live)
    _trained(nightly, folder, None, _previous(nightly, key))
    matched = folder / "matched" / "model"
    if not (matched / "manifest.json").exists():
        _match(nightly, folder / "model", matched)
    return matched, artifact.read_manifest(matched)


def _trained(
    nightly: NightlyRun, folder: Location, start: Location | None, previous: PreviousTable | None = None
) -> Manifest:
    """Return the manifest of the tokenizer in ``folder``; train it on the features of this run if it is missing."""
    cfg, context = nightly.cfg, nightly.context
    if (folder / "model" / "manifest.json").exists():
        context.status = "up to date"
        return artifact.read_manifest(folder / "model")
    read = {"item_features": nightly.version}
    if cfg.tokenizer.pairs:
        items.check(cfg, context.lake)
        pairs.check(cfg, context.lake)
        read |= context.lake.versions("item_pairs")
    context.inputs(read)
    return train(cfg, context, read, folder, start, previous)


def _previous(nightly: NightlyRun, key: str) -> PreviousTable | None:
    """Return the previous codes of the current items; None for a tokenizer that cannot train on them."""
    slack = nightly.cfg.retokenize.refit_slack
    if not slack or not isinstance(nightly.cfg.tokenizer, TrainedSettings):
        return None
    if not nightly.lake.fresh(key, "previous_codes"):
        items_of = nightly.features.select("item_id", "item_index")
        codes = items_of.join(nightly.published.select("item_id", "codes"), "item_id")
        number = nightly.lake.open("item_features", nightly.version).count()
        ordered = layout.by_index(codes, number)  # a worker reads those of its items
        engine.write(ordered, nightly.lake, "previous_codes", tables.PREVIOUS_CODES, key)
    slots = tuple((slot.kind, slot.size) for slot in artifact.read_manifest(nightly.artifact).slots)
    return PreviousTable(version=nightly.lake.version("previous_codes"), slots=slots, slack=slack)


def _match(nightly: NightlyRun, retrained: Location, matched: Location) -> None:
    """Rename the codes of the artifact in ``retrained`` so that most published codes stay, estimated on a sample."""
    tokenizer, manifest = artifact.read(retrained)
    old = nightly.published.select("item_id", F.col("codes").alias("_old"))
    stride = drift.sampling_stride(nightly.live.items, nightly.cfg.retokenize.sample)
    sample = drift.sampled(nightly.features, stride)
    encoded = encode(nightly.spark, sample, retrained, manifest, nightly.cfg.sids.batch).select("item_id", "codes")
    pairs = encoded.join(old, "item_id").select("_old", "codes").collect()  # at most retokenize.sample rows
    renamed = Relabelled(tokenizer)
    live_slots = [(slot.kind, slot.size) for slot in artifact.read_manifest(nightly.artifact).slots]
    if pairs and live_slots == [(slot.kind, slot.size) for slot in manifest.slots]:
        renamed.rename(*(np.array([pair[name] for pair in pairs], np.int32) for name in ("_old", "codes")))
    artifact.rewrite(matched, renamed, manifest)
    write_json(
        matched / "matched.json",
        {"names": renamed.names.tolist(), "order": renamed.order.tolist(), "to": nightly.live.tokenizer},
    )
