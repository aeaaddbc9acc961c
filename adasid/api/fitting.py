"""Fit a tokenizer on arrays in this process, with the same loop, data order and seeds as a pipeline with one worker."""

from __future__ import annotations

import difflib
import inspect
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import ArrayLike, NDArray

from adasid import config
from adasid.api.encoding import SidTokenizer, check_richness
from adasid.api.items import CHUNK, Data, Items, vector, whole_numbers
from adasid.data.reading import Read
from adasid.data.shards import Pairs, Shard
from adasid.datasets.arrow import vectors
from adasid.distributed import Workers, settle
from adasid.errors import ConfigError, InputError
from adasid.metrics.richness import RichnessScale, fit_scale, vector_norms
from adasid.tables import BEHAVIOR
from adasid.tokenizers import artifact
from adasid.training.tokenizer import TokenizerTraining, summary

_CALLER = "adasid.fit"
_SHOWN = ("loss", "reconstruction", "utilisation", "entropy", "seconds")


def fit(
    tokenizer: str,
    data: Data,
    *,
    counts: ArrayLike | None = None,
    richness: ArrayLike | None = None,
    pairs: ArrayLike | None = None,
    seed: int = 17,
    progress: bool = True,
    device: str | None = None,
    threads: int = 1,
    **settings: Any,
) -> SidTokenizer:
    """Fit a tokenizer on the items of a catalogue.

    ``tokenizer``: its name, for example ``"adc-sid"``, ``"rq-vae"`` or ``"rq-kmeans"``.
    ``data``: modality -> matrix [n, D] (NumPy or torch), or an Arrow table or pandas frame whose list columns are the
    modalities. ``behavior`` is the behaviour embedding, all others are content. A row of NaN or of zeros, or a null,
    says that the item lacks the modality. The columns ``item_id``, ``item_index``, ``interactions`` (counts) and
    ``richness`` of a table are read if present, so a run's table ``item_features`` can be passed as it is.
    ``counts`` [n]: training interactions of each item; without them all items count alike where ``count_power`` weighs
    items by them.
    ``richness`` [n] in [0, 1]: how much is known about each item; replaces the richness computed from the data.
    ``pairs`` [p, 2]: row numbers of co-engaged items. An item (first column) is trained with its partners (second
    column), so give both directions. Needed by tokenizers that learn from pairs, refused by the others.
    ``seed``: equal seeds, data, settings and ``threads`` give equal weights on a CPU.
    ``progress``: print a line to stderr for each logged epoch.
    ``device``: where to train, for example ``"cuda"``; None: a GPU if available. The result is on the CPU.
    ``threads``: threads of torch while it trains; 1 gives the weights of the pipeline's worker of one CPU.
    ``settings``: any setting of the tokenizer, sections as dicts: ``codebook_size=256, training={"epochs": 5}``.

    Richness, which ADC-SID and ADA-SID read, is the norm of the behaviour vector, clipped to its percentiles 0.5 and
    99.5 and min-max scaled to [0, 1]; 0 without behaviour. If ``counts`` are given, the norm is checked against them:
    if Spearman's rank correlation is below 0.2, a warning is issued and richness is min-max of log(1 + count) instead,
    so :meth:`SidTokenizer.encode` needs counts, too. Without counts there is no check. The pipeline computes the same
    (``features.norm_percentiles``, ``features.proxy_min_spearman``).

    Raises ConfigError for an unknown name or setting (the nearest one is suggested) or a value that is not allowed,
    InputError for data that cannot be read, TrainingError for a loss that is not finite.

    Source of the default method: ADC-SID, arXiv 2510.25622.
    """
    items = Items.of(data, _CALLER)
    content = [m for m in items.columns if m != BEHAVIOR]
    chosen = settings_of(tokenizer, content, settings, seed)
    items.check(chosen.inputs, f"{_CALLER}: tokenizer {tokenizer!r}")
    if not items.n:
        raise InputError(f"{_CALLER}: the data have no rows; pass at least one item")
    if threads < 1:
        raise ConfigError(f"{_CALLER}: threads is {threads}; it must be at least 1")
    where = _device(device)
    linked = _pairs(pairs, items, chosen)
    values, scale = _richness(items, counts, richness, chosen)
    read, started = _reader(items, chosen.inputs, values, _counts(items, counts)), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="adasid-fit-") as name, _deterministic(threads, where):
        folder, shard = Path(name), Shard(read, chosen.inputs, pairs=linked)
        torch.manual_seed(seed)
        model = artifact.build(chosen, shard.widths)
        training = TokenizerTraining(model, chosen, shard, folder, seed, Workers(), "data of adasid.fit", where)
        rows = training.run(_printer(chosen) if progress else lambda rows: None)
        facts = {
            "metrics": summary(rows[-1], model.widths),
            "seed": seed,
            "seconds": round(time.monotonic() - started, 1),
            "versions": {"torch": torch.__version__, "numpy": np.__version__, "pyarrow": pa.__version__},
            **({"richness": scale._asdict()} if scale else {}),
        }
        artifact.write(folder / "model", model, chosen, facts)
        return SidTokenizer(*artifact.read(folder / "model"))


def settings_of(
    tokenizer: str,
    content: Sequence[str],
    given: Mapping[str, Any],
    seed: int = 17,
) -> config.TokenizerSettings:
    """Return the settings of a tokenizer: its defaults for the ``content`` modalities, overridden by ``given``. Raises
    ConfigError."""
    models = {model.model_fields["name"].default: model for model in config.TOKENIZERS}
    if tokenizer not in models:
        near, names = _nearest(str(tokenizer), models), ", ".join(models)
        what = f"there is no tokenizer {tokenizer!r}; did you mean {near!r}?"
        raise ConfigError(f"{_CALLER}: {what} The names are {names}")
    fields = {name: field.default for name, field in models[tokenizer].model_fields.items() if name != "name"}
    for key in given:
        if key not in fields:
            sections = ((name, inner) for name, default in fields.items() for inner in _inner(default))
            known = {inner: f"{name}={{{inner!r}: ...}}" for name, inner in sections}
            known |= {name: repr(name) for name in (*fields, *_keywords())}
            what = f"{tokenizer!r} has no setting {key!r}; did you mean {known[_nearest(key, known)]}?"
            raise ConfigError(f"{_CALLER}: {what}")
    features = {"features": {"content": list(content)}} if content else {}
    try:
        section = {**_plain(given), "name": tokenizer}
        return config.build({"seed": seed, "tokenizer": section, **features}, _CALLER).tokenizer
    except ConfigError as error:
        text = str(error).replace("tokenizer.", "").replace("features.content", "the content of the data")
        raise ConfigError(text) from None


def _inner(default: Any) -> Iterable[str]:
    """Return the names of the settings in a section."""
    return type(default).model_fields if isinstance(default, config.Section) else ()


def _keywords() -> list[str]:
    """Return the names of the parameters of :func:`fit` itself."""
    parameters = inspect.signature(fit).parameters.items()
    return [name for name, parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def _nearest(name: str, names: Iterable[str]) -> str:
    return str(difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)[0])


def _plain(value: Any) -> Any:
    """Convert NumPy numbers and arrays in ``value`` to Python's."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _richness(
    items: Items,
    counts: ArrayLike | None,
    richness: ArrayLike | None,
    settings: config.TokenizerSettings,
) -> tuple[NDArray[np.float32], RichnessScale | None]:
    """Return richness [n] and the scale by which it was computed, or None if it is given or not read."""
    given = items.extra.get("richness") if richness is None and counts is None else richness
    if given is not None:
        return check_richness(vector(given, items.n, "richness", _CALLER), _CALLER), None
    counts = items.extra.get("interactions") if counts is None else counts
    number = None if counts is None else whole_numbers(counts, items.n, "counts", _CALLER)
    if "router" not in type(settings).model_fields:
        return np.zeros(items.n, np.float32), None
    norms, present = np.zeros(items.n, np.float32), np.zeros(items.n, bool)
    width = items.widths([BEHAVIOR], _CALLER)
    for start in range(0, items.n, CHUNK):
        batch = items.batch(start, start + CHUNK, width)
        norms[start : start + CHUNK] = vector_norms(batch.vectors[BEHAVIOR].numpy())
        present[start : start + CHUNK] = batch.present[BEHAVIOR].numpy()
    scale = fit_scale(norms[present], None if number is None else number[present])
    if scale.source == "norm" or number is None:
        return scale.richness(norms, present), scale
    least = config.Features().proxy_min_spearman
    warnings.warn(
        f"{_CALLER}: Spearman(norm of behaviour, count) is {scale.spearman:.2f}, below {least:g}: the norm does not "
        "measure how much is known about an item, so richness is min-max of log(1 + count); encode needs counts, too",
        UserWarning,
        stacklevel=3,
    )
    return scale.richness(number, present), scale


def _counts(items: Items, counts: ArrayLike | None) -> NDArray[np.int64]:
    """Return training interactions [n], 0 where they are not given."""
    given = items.extra.get("interactions") if counts is None else counts
    return np.zeros(items.n, np.int64) if given is None else whole_numbers(given, items.n, "counts", _CALLER)


def _reader(items: Items, modalities: Sequence[str], richness: NDArray[np.float32], counts: NDArray[np.int64]) -> Read:
    """Return a reader of the catalogue's rows as Arrow batches, from which a shard reads columns."""
    widths = items.widths(modalities, _CALLER)
    index = items.extra.get("item_index", np.arange(items.n)).astype(np.int64)
    if len(np.unique(index)) != items.n:
        fix = "make it unique, or leave it out"
        raise InputError(f"{_CALLER}: the column 'item_index' names an item twice; {fix}")

    def read(columns: list[str]) -> Iterator[pa.RecordBatch]:
        for start in range(0, items.n, CHUNK):
            part = slice(start, min(start + CHUNK, items.n))
            asked = {m: width for m, width in widths.items() if m in columns}
            batch = items.batch(part.start, part.stop, asked)
            arrays = {m: vectors(batch.vectors[m].numpy(), batch.present[m].numpy()) for m in asked}
            plain: dict[str, NDArray[Any]] = {"item_index": index, "richness": richness, "interactions": counts}
            arrays |= {name: pa.array(values[part]) for name, values in plain.items()}
            yield pa.RecordBatch.from_pydict({name: arrays[name] for name in columns})

    return read


def _pairs(pairs: ArrayLike | None, items: Items, settings: config.TokenizerSettings) -> Pairs | None:
    """Return the co-engaged pairs as a shard reads them, by item_index. Raises InputError if they are missing or wrong,
    ConfigError if they would have no effect."""
    name = settings.name
    if not settings.pairs:
        if pairs is not None:
            fix = "leave pairs out, or set the section that learns from them (contrast={}; of 'rq-kmeans' aligner={})"
            raise ConfigError(f"{_CALLER}: tokenizer {name!r} does not learn from pairs with these settings; {fix}")
        return None
    form = "pass pairs=, an array [p, 2] of row numbers of co-engaged items"
    if pairs is None:
        raise InputError(f"{_CALLER}: tokenizer {name!r} learns from co-engaged pairs, and pairs is None; {form}")
    rows = np.asarray(pairs)
    if rows.ndim != 2 or rows.shape[1] != 2 or rows.dtype.kind not in "iu" or not len(rows):
        raise InputError(f"{_CALLER}: pairs is {rows.dtype} of shape {rows.shape}; {form}")
    if rows.min() < 0 or rows.max() >= items.n:
        span = f"{rows.min()} to {rows.max()}"
        raise InputError(f"{_CALLER}: pairs names rows {span}, but there are {items.n} items; {form}")
    return Pairs(*items.index[rows.astype(np.int64)].T)


def _printer(settings: config.TokenizerSettings) -> Callable[[list[dict[str, float]]], None]:
    """Return a callback that prints the last row of the log to stderr."""
    epochs = settings.epochs.epochs if settings.epochs else 1

    def show(rows: list[dict[str, float]]) -> None:
        row = rows[-1]
        figures = "  ".join(f"{name} {row[name]:.4g}" for name in _SHOWN if name in row)
        print(f"{settings.name}: epoch {int(row['epoch'])}/{epochs}  {figures}", file=sys.stderr)

    return show


def _device(name: str | None) -> torch.device:
    """Return the device to train on. Raises ConfigError for an unavailable device."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"{_CALLER}: device is {name!r}; it must be one that torch knows, such as 'cpu'") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError(f"{_CALLER}: device is {name!r}, but torch sees {count} GPUs; leave device out, or set 'cpu'")
    return device


@contextmanager
def _deterministic(threads: int, device: torch.device) -> Iterator[None]:
    """Train as deterministically as the pipeline's workers, then restore torch's threads, kernels and random state."""
    before, kernels = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    flags, fill = torch.utils.deterministic, "fill_uninitialized_memory"
    filled = getattr(flags, fill)
    gpus = [device.index or 0] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=gpus):
            settle(threads)
            yield
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(kernels, warn_only=warn_only)
        setattr(flags, fill, filled)
