"""Build the sections on the run: the training of the tokenizer, the stages, and the provenance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.figure import Figure

from adasid.config import digest
from adasid.report import curves
from adasid.report.material import Material, Row, last_stages, part
from adasid.report.page import Plot, Section, Table
from adasid.report.words import DASH, NOT_RUN, count, known, listed, mean, number, plain, seconds, share

_CURVES: tuple[tuple[str, str, Callable[[Sequence[Row], Any], Figure], str, str], ...] = (
    (
        *("tokenizer_losses", "loss", lambda rows, size: curves.losses(rows)),
        "Lines of the total loss and of its parts over the epochs of training.",
        "The total should fall and level off. Parts are drawn before their weights; those below a thousandth of the "
        "largest are left out.",
    ),
    (
        *("tokenizer_fvu", "fvu_", lambda rows, size: curves.unexplained(rows)),
        "Unexplained variance of each modality over epochs.",
        "Lower is better: how much of each modality the codes do not explain; 1 is no better than the mean.",
    ),
    (
        *("tokenizer_sparsity", "sparsity", lambda rows, size: curves.sparsity(rows)),
        "Above: share of inactive behaviour slots and its target over epochs. Below: the weight λ of the sparsity "
        "loss, logarithmic.",
        "λ rises while too many slots are active and falls when too few are; the two lines above should meet.",
    ),
    (
        *("tokenizer_use", "utilisation", curves.code_use),
        "Above: share of codes in use over epochs. Below: entropy of code use with its cap.",
        "Codes in use should reach 100 % and stay there; entropy near the cap means that they are used evenly.",
    ),
)
"""Name of the figure, prefix of the metric that it needs, function that draws it from rows and codebook size, alt text,
caption."""


def tokenizer(material: Material) -> Section:
    """Show how the tokenizer learned."""
    key, title, training = "tokenizer", "Training of the tokenizer", material.tokenizer
    if not training:
        return Section(key, title, missing=NOT_RUN)
    rows, facts = training.rows, training.facts
    size = (facts.get("config") or {}).get("codebook_size") or material.codes.get("codebook_size")
    present = {name for row in rows for name, value in row.items() if value is not None}
    plots = [
        Plot(name, draw(rows, size), alt, text)
        for name, needs, draw, alt, text in _CURVES
        if any(metric.startswith(needs) for metric in present)
    ]
    last, controller = rows[-1] if rows else {}, facts.get("controller") or {}
    table = [
        ("Method", plain(facts.get("tokenizer"))),
        ("Parameters", count(facts.get("parameters"))),
        ("Epochs", count(last.get("epoch"))),
        ("Steps", count(last.get("step"))),
        ("Share of time waiting for data, mean", share(mean(curves.series(rows, "wait_share")[1].tolist()))),
        ("Alignment α", number(controller.get("alpha"), 2)),
        ("Alignment β", number(controller.get("beta"), 2)),
    ]
    tables = [Table("The training", ("Quantity", "Value"), [row for row in table if row[1] != DASH])]
    lead = (
        ""
        if material.same_tokenizer
        else "These curves are not those of the generation shown above: its tokenizer's folder is not there, so the "
        "newest one is shown."
    )
    return Section(key, title, lead, plots, tables)


def stages(material: Material) -> Section:
    """Show the wall time of each stage's last run."""
    key, title, rows = "stages", "Stages and wall time", last_stages(material.stages)
    if not rows:
        return Section(key, title, missing=NOT_RUN)
    table = [
        (" ".join(filter(None, (row["stage"], part(row)))), str(row.get("status", DASH)), seconds(row.get("seconds")))
        for row in rows
    ]
    total = sum(row["seconds"] for row in rows if known(row.get("seconds")))
    lead = (
        "A stage that was up to date had nothing to do."
        if any(row.get("status") == "up to date" for row in rows)
        else ""
    )
    last = Table(
        "Last run of each stage",
        ("Stage", "Status", "Wall time"),
        [*table, ("Total", "", seconds(total))],
        words=2,
        notes=[*map(_facts, rows), ""],
    )
    return Section(key, title, lead, tables=[last])


def _facts(row: Row) -> str:
    return " · ".join(f"{name} {plain(value)}" for name, value in (row.get("facts") or {}).items() if name != "part")


def provenance(material: Material) -> Section:
    """Show the exact inputs and versions."""
    generation, facts = material.generation or {}, (material.tokenizer.facts if material.tokenizer else {})
    rows = [
        ("Run", material.cfg.name),
        ("Configuration digest", digest(material.cfg)),
        ("Seed", str(facts.get("seed", material.cfg.seed))),
    ]
    if generation:
        rows += [
            (
                "Generation",
                f"{generation['generation']} (sids version {generation['sids_version']}, run {generation['run']})",
            ),
            ("Tokenizer of the generation", generation["tokenizer"]),
        ]
    if facts.get("digest") and facts["digest"] != generation.get("tokenizer"):
        rows.append(("Tokenizer shown", str(facts["digest"])))
    versions = {
        "The generation read": generation.get("inputs"),
        "The tokenizer was trained on": facts.get("inputs"),
        "This report read": material.versions,
    }
    rows += [
        (name, listed([f"{table} v{version}" for table, version in tables.items()]))
        for name, tables in versions.items()
        if tables
    ]
    rows += [(f"Library {name}", str(version)) for name, version in (facts.get("versions") or {}).items()]
    return Section(
        "provenance", "Provenance", tables=[Table("Inputs, seed and versions", ("What", "Value"), rows, words=2)]
    )
