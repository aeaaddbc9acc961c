"""Write a run's report: read the aggregates of the other stages, draw, and write one HTML page and its figures."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

import pyarrow.compute as pc

from adasid import tables
from adasid.config import Config
from adasid.errors import AdasidError, InputError, first_line
from adasid.files import Location, modified, write_bytes, write_text
from adasid.report import nights, page, summary
from adasid.report.material import Material, Training
from pipelines import explore, stage, staleness, traces
from pipelines.engines.lake import Lake
from pipelines.engines.tracking import StageContext
from pipelines.features.items import richness
from pipelines.publish import generations
from pipelines.publish.generations import Candidate, Generation
from pipelines.run import Run
from pipelines.stage import Inputs, Stage

_SHOWN = ("catalog_stats", "content_quality", "generations", "live")


def run(cfg: Config, context: StageContext) -> None:
    """Write ``<run>/report/index.html``, its PNG figures and the page of items and codes, and log them. Raises
    InputError where there is nothing to report."""
    stage.run(REPORT, cfg, context)


def _build(inputs: Inputs, context: StageContext) -> dict[str, int]:
    cfg = inputs.cfg
    material = gather(cfg, inputs.lake)
    if material.empty:
        raise InputError(
            f"run {cfg.name}: nothing to report in {cfg.run_dir}; run a stage first, for example build_features"
        )
    for line in material.lags:
        context.note(line)
    if material.generation and material.generation["hold"]:
        generation = material.generation
        context.facts["on hold"] = f"generation {generation['generation']}, since {generation['hold']}"
    folder = Run(cfg).report()
    explored = _explore(cfg, inputs.lake, material, context)
    figures = write(folder, summary.build(replace(material, explore=explored)))
    if Run(cfg).report("nights").is_dir():  # a roll-back or another publication may have followed the last night
        write_nights(cfg, inputs.lake)
    context.inputs(material.versions)
    context.artifact(folder)
    context.facts.update(page=str(folder / "index.html"), figures=figures)
    return {}


def _explore(cfg: Config, lake: Lake, material: Material, context: StageContext) -> bool:
    """Write the page of items and codes; return whether it is written. The report does not fail with it."""
    if not material.published:
        return False
    try:
        explore.write(cfg, lake, generations.live(lake), material.created)
    except Exception as error:
        where = "" if isinstance(error, AdasidError) else traces.keep(cfg, error)
        context.note(f"the page of items and codes is not written: {first_line(error)}{where}", "WARN")
        return False
    return True


def write(folder: Location, content: page.Page, cells: Sequence[Mapping[str, Any]] = ()) -> int:
    """Write the page as ``index.html`` with its PNG figures, and the ``cells`` of a comparison as ``cells.csv``; return
    the number of figures."""
    html, pictures = page.render(content)
    for stale in {str(path): path for path in folder.glob("*.png") if path.name not in pictures}.values():
        stale.unlink(missing_ok=True)
    for name, data in pictures.items():
        write_bytes(folder / name, data)
    write_text(folder / "index.html", html)
    if cells:
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, list(dict.fromkeys(key for row in cells for key in row)))
        writer.writeheader()
        writer.writerows(cells)
        write_text(folder / "cells.csv", table.getvalue())
    return len(pictures)


def write_nights(cfg: Config, lake: Lake, dry: Candidate | None = None) -> Location:
    """Write the page of the last generations, of the last refusal and of a ``dry`` run to ``<run>/report/nights``, with
    its figures; return the folder."""
    folder, refused = Run(cfg).report("nights"), _object(Run(cfg).refused) if Run(cfg).refused.exists() else None
    last = [generation.model_dump() for generation in generations.history(lake)[-cfg.retokenize.keep :]]
    write(folder, nights.build(cfg.name, last, refused, dry.model_dump() if dry else None))
    return folder


def gather(cfg: Config, lake: Lake) -> Material:
    """Collect the results that the stages of this run have written so far."""
    versions = {table: lake.version(table) for table in _SHOWN if lake.exists(table)}
    catalog = lake.read("catalog_stats", versions["catalog_stats"]).to_pylist() if "catalog_stats" in versions else []
    published = generations.history(lake)
    live = next((generation for generation in published if generation.live), None)
    refused = published[-1] if published and not published[-1].live else None
    shown = live or refused
    artifacts, stages = Run(cfg).artifacts, _rows(Run(cfg).journal)
    return Material(
        cfg,
        catalog=_catalog(catalog, richness(Run(cfg).lake)),
        content=_content(cfg, lake, versions),
        refused_contents=_refused_contents(Run(cfg).lake),
        generation=shown.model_dump() if shown else None,
        refused=refused.model_dump() if live and refused else None,
        behavior=_behavior(artifacts / "behavior") if cfg.behavior.source == "sasrec" else None,
        tokenizer=_tokenizer(artifacts / "tokenizer", shown.tokenizer if shown else None),
        stages=stages,
        versions=versions,
        lags=_lags(Run(cfg).lake, live, stages),
        created=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
    )


def _lags(lake: Lake, live: Generation | None, stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence for each table that lags. A nightly run without changes has read ``item_features`` too, though
    it left no generation."""
    if not live:
        return staleness.sentences(staleness.lags(lake, "item_features")) if lake.exists("item_features") else []
    read = dict(live.inputs)
    for facts in (row["facts"] for row in stages if row["stage"] == "retokenize" and row["status"] == "up to date"):
        if "item_features" in facts and facts.get("generation") == live.generation:
            read["item_features"] = max(read["item_features"], facts["item_features"])
    return staleness.sentences(staleness.lags(lake, "sids", live.sids_version, read))


def _catalog(rows: list[dict[str, Any]], richness: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Merge the rows of ``catalog_stats`` and ``richness_stats`` (null: none yet); Arrow returns maps as lists of
    pairs."""
    if not rows:
        return None
    later = {name: (richness or {}).get(name) for name in tables.RICHNESS_STATS.names}
    maps = {name: dict(rows[0].get(name) or ()) for name in ("rejected", "strata", "missing")}
    return {**later, **rows[0], **maps}


def _content(cfg: Config, lake: Lake, versions: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return the rows of ``content_quality`` of the current modalities."""
    if "content_quality" not in versions:
        return []
    rows = lake.read("content_quality", versions["content_quality"]).to_pylist()
    return [row for row in rows if row["modality"] in cfg.features.content]


def _refused_contents(lake: Lake) -> dict[str, int]:
    """Count the contents that could not be encoded, by reason, in the run that made the current vectors."""
    if not lake.exists("content_embeddings") or not lake.exists("rejected_rows"):
        return {}
    mine = pc.field("input_hash") == lake.input_hash("content_embeddings")
    found = Counter[str]()
    for batch in lake.batches("rejected_rows", None, ["reason", "copies"], mine):
        for reason, copies in zip(batch["reason"].to_pylist(), batch["copies"].to_pylist()):
            found[reason.removeprefix("content_")] += copies
    return dict(found)


def _behavior(folder: Location) -> Training | None:
    results = sorted(folder.glob("*/result.json"), key=modified)
    return Training(_rows(results[-1].parent / "metrics.jsonl"), _object(results[-1])) if results else None


def _tokenizer(folder: Location, digest: str | None) -> Training | None:
    """Return the training of the artifact ``digest``, else the newest."""
    paths = [*folder.glob("*/model/manifest.json"), *folder.glob("*/matched/model/manifest.json")]
    manifests = [(path, _object(path)) for path in sorted(paths, key=modified)]
    if not manifests:
        return None
    path, manifest = next(
        (pair for pair in manifests if digest in {pair[1].get("digest"), pair[0].parent.parent.name}), manifests[-1]
    )
    fitted = path.parent.parent
    training = fitted.parent if fitted.name == "matched" else fitted
    return Training(_rows(training / "metrics.jsonl"), {"folder": training.name, "digest": training.name, **manifest})


def _object(path: Location) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); remove its folder and run the stage again") from None
    return dict(value)


def _rows(path: Location) -> list[dict[str, Any]]:
    """Return the rows of a JSON-lines file, none where there is no file. A last line that a killed job left incomplete
    is dropped."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise InputError(
                    f"{path}, line {number}: not valid JSON ({error}); remove the line or run the stage again"
                ) from None
    return rows


REPORT = Stage(
    "report",
    "python",
    reads=stage.nothing,
    writes=stage.nothing,
    also=(*_SHOWN, *explore.READ),
    settings=lambda cfg, lake: {},
    body=_build,
    prefix="report",
    fresh=lambda inputs, lake: False,
)
"""Reads aggregates, writes pages. It is cheap, so it always runs."""
