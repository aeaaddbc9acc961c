"""The stage that trains the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping

from adasid.config import Config
from adasid.files import Location
from adasid.tokenizers import artifact
from adasid.tokenizers.artifact import Manifest
from adasid.training.checkpoint import Checkpoints
from pipelines import stage, staleness
from pipelines.content import vectors
from pipelines.engines.lake import Lake
from pipelines.engines.tracking import StageContext
from pipelines.features import items, pairs
from pipelines.run import Run
from pipelines.stage import Inputs, Stage
from pipelines.training import launch, workers
from pipelines.training.payload import PreviousTable
from pipelines.training.register import register

_SHOWN = ("loss", "reconstruction", "codebook", "alignment", "sparsity", "utilisation", "entropy", "seconds")


def run(cfg: Config, context: StageContext) -> None:
    """Train on ``item_features``; write the artifact to ``artifacts/tokenizer/<key>/model`` and register it in MLflow
    as candidate."""
    inputs = stage.resolve(declare(), cfg, context.lake)
    staleness.check(context, inputs.versions["item_features"])
    manifest = fit(cfg, context, inputs=inputs)
    register(cfg, context, folder_of(inputs) / "model", manifest.digest, "candidate")


def declare(kind: str = "tokenizer") -> Stage:
    """Declare the training of ``cfg.tokenizer``, into a folder of ``artifacts/<kind>``."""

    def body(inputs: Inputs, context: StageContext) -> dict[str, int]:
        train(inputs.cfg, context, inputs.versions, folder_of(inputs, kind))
        return {}

    return Stage(
        "tokenizer",
        "ray",
        reads=lambda cfg: ("item_features", "item_pairs") if cfg.tokenizer.pairs else ("item_features",),
        writes=stage.nothing,
        settings=lambda cfg, lake: {"tokenizer": cfg.tokenizer, "seed": cfg.seed},
        body=body,
        prefix="tokenizer",
        makes=("tokenizer",),
        fresh=lambda inputs, lake: (folder_of(inputs, kind) / "model" / "manifest.json").exists(),
    )


def folder_of(inputs: Inputs, kind: str = "tokenizer") -> Location:
    """Return the folder of the tokenizer of these inputs; it may not exist yet."""
    return Run(inputs.cfg).artifact(kind, inputs.hash)


def fit(cfg: Config, context: StageContext, kind: str = "tokenizer", inputs: Inputs | None = None) -> Manifest:
    """Train or fit ``cfg.tokenizer`` unless its artifact exists; return its manifest."""
    step = declare(kind)
    inputs = inputs or stage.resolve(step, cfg, context.lake)
    if cfg.tokenizer.pairs:
        items.check(cfg, context.lake)
        pairs.check(cfg, context.lake)
    model = folder_of(inputs, kind) / "model"
    if stage.run(step, cfg, context, inputs) is None:
        context.status = "up to date"
    return artifact.read_manifest(model)


def train(
    cfg: Config,
    context: StageContext,
    read: Mapping[str, int],
    folder: Location,
    start: Location | None = None,
    previous: PreviousTable | None = None,
) -> Manifest:
    """Train or fit the tokenizer on the versions ``read`` into ``folder/model``; return its manifest. ``start``:
    continue from this artifact, under ``retokenize.warm``; ``previous``: previous codes that training retains within
    its tolerance."""
    read = {**read, **({"previous_codes": previous.version} if previous else {})}
    payload = launch.payload(cfg, context.lake, read, folder)
    encoders = vectors.encoders(Lake(context.lake.root, cfg.pins))
    payload = payload.model_copy(update={"start": start, "previous": previous, "encoders": encoders})
    epochs = cfg.tokenizer.epochs.epochs if cfg.tokenizer.epochs else 1
    launch.fit(workers.tokenizer, payload, context, "tokenizer", epochs, _SHOWN)
    manifest = artifact.read_manifest(folder / "model")
    Checkpoints(folder / "checkpoints").clear()
    quality = manifest.metrics
    if quality.get("least_active", 1.0) < 0.001:
        context.note(
            "warning: the gate has switched a behaviour slot off for all items; it cannot come back: lower "
            "tokenizer.router.sparsity or tokenizer.router.item_weight"
        )
    facts = {"utilisation": round(quality["utilisation"], 4), "entropy": round(quality["entropy"], 3)}
    context.facts.update({"tokenizer": manifest.digest, **facts})
    context.facts.update({f"FVU {m}": round(value, 3) for m, value in quality["fvu"].items()})
    return manifest
