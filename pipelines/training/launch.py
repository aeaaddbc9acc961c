"""Start the training of a stage on its workers, and show its progress."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from adasid.config import Config
from adasid.config.secrets import masked_config
from adasid.errors import InputError
from adasid.files import Location
from pipelines.engines import cluster
from pipelines.engines.lake import Lake
from pipelines.engines.spark import versions as library_versions
from pipelines.engines.tracking import StageContext
from pipelines.training.payload import Payload


def payload(cfg: Config, lake: Lake, read: Mapping[str, int], folder: Location) -> Payload:
    """Return what the workers need to train on the versions ``read`` into ``folder``; they get no secrets."""
    return Payload(
        config=masked_config(cfg), lake=lake.root, read=dict(read), folder=folder, library_versions=library_versions()
    )


def fit(
    function: Callable[[Payload], None],
    sent: Payload,
    context: StageContext,
    name: str,
    epochs: int,
    shown: tuple[str, ...],
) -> None:
    """Run ``function`` on every worker. Every epoch's metrics are logged to MLflow (those of a resumed run at once),
    and the metrics ``shown`` are printed, one line an epoch of ``epochs``."""
    earlier = cluster.rows(sent.folder)
    for row in earlier:
        context.metrics(row, int(row["epoch"]))
    logged = {row["epoch"] for row in earlier}

    def show(row: dict[str, float]) -> None:
        if row["epoch"] not in logged:
            logged.add(row["epoch"])
            context.metrics(row, int(row["epoch"]))
        figures = "  ".join(f"{name} {row[name]:.4g}" for name in shown if name in row)
        context.note(f"epoch {int(row['epoch'])}/{epochs}  {figures}")

    cluster.fit(function, sent, sent.config.ray, f"{name}-{sent.folder.name}", sent.folder, show, context.note)


def check_same_run(input_hashes: Mapping[str, str]) -> None:
    """Raise InputError where tables of one stage come from different runs of it."""
    if len(set(input_hashes.values())) > 1:
        raise InputError(
            f"{' and '.join(input_hashes)} come from different runs of build_features (was one cut off?): run "
            "jobs/build_features.py again"
        )
