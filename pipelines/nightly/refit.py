"""New tokenizers for a night: the live one trained on, or one trained anew that holds on to the published codes, and whose codes and slots are then
matched with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pyspark.sql import functions as F

from adasid import tables
from adasid.config import TrainedSettings, digest
from adasid.files import write_json
from adasid.tokenizers import artifact
from adasid.tokenizers.relabel import Relabelled
from pipelines import sids, train
from pipelines.engines import spark as engine
from pipelines.features import items, pairs
from pipelines.nightly import drift
from pipelines.nightly.night import Night
from pipelines.run import Run


def fit(night: Night, policy: str, live: Path) -> tuple[Path, dict[str, Any]]:
    """The artifact of policy ``warm`` or ``refit`` on today's features, and its manifest. ``live``: the artifact of the live SIDs."""
    cfg, lake = night.cfg, night.lake
    settings = cfg.retokenize.warm if policy == "warm" else cfg.retokenize.refit_slack
    made = lake.stamps({"item_features": night.version})
    key = digest(policy, night.live["tokenizer"], night.live["generation"], cfg.tokenizer, settings, cfg.seed, made)
    folder = Run(cfg).artifact("tokenizer", key)
    if policy == "warm":
        return folder / "model", _trained(night, folder, live)
    _trained(night, folder, None, _held(night, key))
    matched = folder / "matched" / "model"
    if not (matched / "manifest.json").exists():
        _match(night, folder / "model", matched)
    return matched, artifact.read_manifest(matched)


def _trained(night: Night, folder: Path, start: Path | None, held: train.HeldCodes | None = None) -> dict[str, Any]:
    """The manifest of the tokenizer in ``folder``, trained on the features of this run unless it is there."""
    cfg, track = night.cfg, night.track
    if (folder / "model" / "manifest.json").exists():
        track.status = "up to date"
        return artifact.read_manifest(folder / "model")
    read = {"item_features": night.version}
    if cfg.tokenizer.pairs:
        items.check(cfg, track.lake)
        pairs.check(cfg, track.lake)
        read |= track.lake.versions("item_pairs")
    track.inputs(read)
    return train.train_tokenizer(cfg, track, read, folder, start, held)


def _held(night: Night, key: str) -> train.HeldCodes | None:
    """The published codes of today's items, where the tokenizer is one that can hold on to them."""
    slack = night.cfg.retokenize.refit_slack
    if not slack or not isinstance(night.cfg.tokenizer, TrainedSettings):
        return None
    if not night.lake.fresh(key, "held_codes"):
        codes = night.features.select("item_id", "item_index").join(night.published.select("item_id", "codes"), "item_id")
        engine.write(codes, night.lake, "held_codes", tables.HELD_CODES, key)
    slots = artifact.read_manifest(Path(night.live["artifact"]))["slots"]
    return {
        "version": night.lake.version("held_codes"),
        "slots": [[slot["kind"], slot["size"]] for slot in slots],
        "slack": slack,
    }


def _match(night: Night, anew: Path, matched: Path) -> None:
    """Write the artifact in ``anew`` under the names that keep most published codes, on a sample."""
    tokenizer, manifest = artifact.read(anew)
    old = night.published.select("item_id", F.col("codes").alias("_old"))
    sample = drift.sampled(night.features, drift.every(night.live["items"], night.cfg.retokenize.sample))
    encoded = sids.encode(night.spark, sample, anew, manifest, night.cfg.sids.batch).select("item_id", "codes")
    pairs = encoded.join(old, "item_id").select("_old", "codes").collect()  # at most retokenize.sample rows
    renamed = Relabelled(tokenizer)
    same = [(slot["kind"], slot["size"]) for slot in artifact.read_manifest(Path(night.live["artifact"]))["slots"]]
    if pairs and same == [(slot["kind"], slot["size"]) for slot in manifest["slots"]]:
        renamed.rename(*(np.array([pair[name] for pair in pairs], np.int32) for name in ("_old", "codes")))
    artifact.rewrite(matched, renamed, manifest)
    write_json(matched / "matched.json", {"names": renamed.names.tolist(), "order": renamed.order.tolist(), "to": night.live["tokenizer"]})
