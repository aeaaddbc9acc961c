"""The sections of the report: each takes the material and says, shows and tabulates one part of it, or says why it cannot."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from adasid.config import digest
from adasid.report import figures
from adasid.report.material import Material, Row, last_stages, part
from adasid.report.page import Plot, Section, Table
from adasid.report.words import DASH, count, known, listed, number, plain, plural, seconds, share
from adasid.tables import STRATA

NOT_RUN = "Not run yet."
BROUGHT = "Not trained: the embeddings were brought with the items."


def catalogue(material: Material) -> Section:
    """How events spread over items, and what was read and refused."""
    key, title, stats = "catalogue", "The catalogue", material.catalog
    if not stats:
        return Section(key, title, missing=NOT_RUN)
    strata, rejected = stats["strata"], stats["rejected"]
    silent = sum(point["y"] <= 0 for point in stats["popularity"]) > 0
    plots = [
        Plot(
            "popularity",
            figures.popularity(stats["popularity"], strata.get("head")),
            "Line on logarithmic axes: training events of an item, falling with its popularity rank.",
            "Each step right is a less popular item; the steeper the fall, the fewer items hold the events."
            + (" Items without a training event lie below the picture." if silent else ""),
        ),
        Plot(
            "lorenz",
            figures.lorenz(stats["lorenz"], stats["gini"]),
            f"Lorenz curve of training events over items, Gini coefficient {number(stats['gini'], 2)}, below the diagonal of equality.",
            "The further the curve sags below the diagonal, the longer the tail: "
            f"the most popular {plural(strata.get('head', 0), 'item')} take {share(stats['head_interactions'])} of the training events.",
        ),
    ]
    rows = [
        ("Items", count(stats["items"])),
        ("Users", count(stats["users"])),
        ("Events kept", count(stats["interactions"])),
        ("of which training", count(stats["train_interactions"])),
        ("Duplicates dropped", count(stats["duplicates"])),
        ("Gini of training events over items", number(stats["gini"])),
        ("Share of training events on head items", share(stats["head_interactions"])),
    ]
    rows += [(f"Items in stratum {name}", count(strata[name])) for name in (*STRATA, *sorted(set(strata) - set(STRATA))) if name in strata]
    refused = [(reason, count(rows)) for reason, rows in sorted(rejected.items(), key=lambda pair: -pair[1])] or [("none", "0")]
    return Section(
        key,
        title,
        plots=plots,
        tables=[Table("Size and concentration", ("Quantity", "Value"), rows), Table("Rejected input rows", ("Reason", "Rows"), refused)],
    )


def behavior(material: Material) -> Section:
    """The behaviour embeddings: whether their norm tells rich items from poor ones, and how they were trained."""
    key, title, stats, training = "behaviour", "Behaviour embeddings", material.catalog or {}, material.behavior
    plots: list[Plot] = []
    tables: list[Table] = []
    lead = BROUGHT if material.cfg.behavior.source == "column" else "" if training else "The behaviour model is not trained yet."
    if stats.get("norm_by_count"):
        fallen = stats["richness_source"] == "count"
        use = (
            f"The correlation is below {material.cfg.features.proxy_min_spearman:g}, so richness rests on the count instead of the norm."
            if fallen
            else "Richness rests on the norm."
        )
        plots.append(
            Plot(
                "norm",
                figures.norm_by_count(stats["norm_by_count"], stats["spearman"]),
                "Median and 10th to 90th percentile of the behaviour embedding's norm, over the number of training events of the item (logarithmic).",
                f"A rising line means that the norm tells how much is known about an item. {use}",
            )
        )
        rows = [
            ("Spearman(norm, count), items with events", number(stats["spearman"])),
            ("Richness rests on", "the count" if fallen else "the norm"),
            ("Norm mapped to richness 0", number(stats["norm_low"])),
            ("Norm mapped to richness 1", number(stats["norm_high"])),
        ]
        tables.append(Table("Norm and richness", ("Quantity", "Value"), rows))
    if training:
        more, table = _behavior_training(material, training.rows, training.facts)
        plots, tables = plots + more, [*tables, table]
    if not plots:
        return Section(key, title, missing=lead or NOT_RUN)
    return Section(key, title, lead, plots, tables)


def _behavior_training(material: Material, rows: Sequence[Row], result: Row) -> tuple[list[Plot], Table]:
    best, early, used = result.get("best_epoch"), result.get("early_epoch"), result.get("norm_checkpoint", "early")
    plots = []
    if len(figures.series(rows, "validation_recall@10")[0]):
        plots.append(
            Plot(
                "behavior_recall",
                figures.recall(rows, best, early),
                "Recall at 10 on validation and test users for each epoch, with the chosen epochs marked.",
                f"The embeddings come from epoch {best}, the best NDCG@10 on validation; the test line was never used to choose.",
            )
        )
    if len(figures.series(rows, "spearman")[0]):
        plots.append(
            Plot(
                "behavior_spearman",
                figures.spearman(rows, best, early, material.cfg.features.proxy_min_spearman),
                "Rank correlation of embedding norm and training count for each epoch, with the chosen epochs marked.",
                f"The norm that measures richness comes from the {used} checkpoint (epoch {early if used == 'early' else best}, Spearman {number(result.get('spearman'), 2)}).",
            )
        )
    test, validation = result.get("test") or {}, result.get("validation") or {}
    names = sorted(
        {*test, *validation},
        key=lambda name: (
            name.partition("@")[0] != "recall",
            int(name.partition("@")[2] or 0) if name.partition("@")[2].isdigit() else 0,
            name,
        ),
    )
    scores = [
        (name, number(validation.get(name), 4), number(test.get(name), 4)) for name in names if known(test.get(name)) or known(validation.get(name))
    ]
    return plots, Table(
        f"Next-item scores of the embeddings, {plural(int(result.get('users') or 0), 'user')}, full catalogue",
        ("Metric", "Validation", "Test"),
        scores,
    )


def weights(material: Material) -> Section:
    """How strongly content is aligned to behaviour, and how many behaviour codes an item gets."""
    key, title, stats = "weights", "Alignment and routing by popularity", material.catalog or {}
    if not material.routed:
        return Section(key, title, missing=f"The tokenizer {material.cfg.tokenizer.name} has neither an alignment controller nor a router.")
    plots: list[Plot] = []
    quantiles, controller, enabled = stats.get("richness_quantiles"), material.controller, material.controlled
    if quantiles:
        if not enabled:
            text = "The controller is switched off, so every item is aligned with full strength."
        elif controller:
            weak = float(np.mean(figures.alignment_weight(figures.sample(quantiles), *controller) < 0.05))
            text = f"Items under the flat part of the blue curve are hardly aligned: {share(weak)} of the items have a weight below 0.05."
        else:
            text = "This run's own curve is not known before the tokenizer is trained."
        plots.append(
            Plot(
                "alignment",
                figures.alignment(controller, quantiles, flat=not enabled),
                "Above: sigmoid curves of the alignment weight over richness, this run and four settings of the papers. Below: histogram of the richness of the items.",
                text,
            )
        )
    plots += _routing(material)
    return Section(key, title, plots=plots) if plots else Section(key, title, missing=NOT_RUN)


def _routing(material: Material) -> list[Plot]:
    plots = []
    for name, metric, heading, label, text in (
        (
            "router_weights",
            "weights_by_stratum",
            "Router weights by stratum",
            "mean weight",
            "Popular items should lean on their behaviour codes more than rare ones; cold items have none, so their weight is 0.",
        ),
        (
            "router_active",
            "active_by_stratum",
            "Active behaviour slots by stratum",
            "share of items with slot active",
            "The share of items that carry each behaviour code, from the most to the least popular stratum.",
        ),
    ):
        values = _strata(material, metric)
        if values:
            drawing = figures.by_stratum(values, list(material.behavior_slots.values()), heading, label, shares=metric == "active_by_stratum")
            plots.append(Plot(name, drawing, f"Grouped bars, one group a stratum ({', '.join(values)}), one bar a behaviour slot: {label}.", text))
    counts = _ordered(material.codes.get("active_count_by_stratum") or {})
    if counts and material.behavior_slots:
        means = [f"{name} {number(sum(index * value for index, value in enumerate(row)), 2)}" for name, row in counts.items()]
        plots.append(
            Plot(
                "router_counts",
                figures.active_counts(counts),
                "Stacked bars: share of the items of each stratum with 0, 1, 2 or more active behaviour slots.",
                f"Mean number of behaviour codes of an item: {', '.join(means)}.",
            )
        )
    return plots


def _ordered(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in STRATA if values.get(name)}


def _strata(material: Material, metric: str) -> dict[str, list[float]]:
    """The behaviour slots' values by stratum; rows may list all slots or the behaviour slots only."""
    slots, total = material.behavior_slots, len(material.codes.get("slots", ()))
    rows = _ordered(material.codes.get(metric) or {})
    return {name: [row[index] for index in slots] if len(row) == total else list(row) for name, row in rows.items()} if slots else {}


def semantic_ids(material: Material) -> Section:
    """What the published codes are worth: use, entropy, collisions, reconstruction, gates."""
    key, title, codes = "sids", "Semantic IDs", material.codes
    if not material.generation:
        return Section(key, title, missing="Nothing published yet.")
    lead = f"Generation {material.generation['generation']}, {plural(material.generation['items'], 'item')}" + (
        "." if material.published else ": not published, a gate refused it."
    )
    used = f"{min(codes['utilisation'], default=0):.0%}".replace("%", " %")
    plots = [
        Plot(
            "usage",
            figures.usage(codes["slots"], codes["codes"], codes["utilisation"], codes["entropy"]),
            f"One small chart a codebook: number of items for each code, most used first. Slots {', '.join(codes['slots'])}; lowest utilisation {used}.",
            "A flat profile near the dashed line (even use) is good; a spike at the left means that few codes carry most items. Entropy is given against its cap ln K.",
        ),
        Plot(
            "groups",
            figures.groups(codes["group_sizes"], codes["collision_distinct"], codes["collision_items"], codes["largest_group"]),
            "Bars on logarithmic axes: number of semantic IDs carried by one item, two items, three items and so on.",
            "The first bar counts items with an ID of their own; everything to its right is shared.",
        ),
    ]
    columns = ("Slot", "Utilisation", "Entropy (nats)", "of ln K", "Perplexity", "Top-1 load", "PAD")
    rows = [
        (slot, share(used), number(nats), share(nats / math.log(max(2, len(counts)))), number(perplexity, 1), share(top), share(pad))
        for slot, used, nats, counts, perplexity, top, pad in zip(
            *(codes[name] for name in ("slots", "utilisation", "entropy", "codes", "perplexity", "top1", "pad"))
        )
    ]
    gates = [
        (gate["gate"], plain(gate["value"]), plain(gate["threshold"]), "✓ passed" if gate["passed"] else "✗ failed")
        for gate in material.generation["gates"]
    ]
    tables = [
        _code_metrics(material),
        Table("Each codebook", columns, rows),
        Table("Gates before publishing", ("Gate", "Value", "Threshold", "Result"), gates),
    ]
    return Section(key, title, lead, plots, tables)


def _code_metrics(material: Material) -> Table:
    """The metrics of methods 8.1 to 8.5, each with what it is."""
    codes, manifest = material.codes, (material.tokenizer.facts if material.tokenizer and material.same_tokenizer else {})
    trained = manifest.get("metrics") or {}
    distinct, items = codes["distinct"], codes["items"]
    rows = [
        (
            "Reconstruction loss L_recon",
            number(trained.get("reconstruction"), 4),
            trained.get("reconstruction_definition")
            or "squared error per dimension on inputs of unit variance, summed over modalities, mean over items (an absent modality counts 0), last epoch of training",
        )
    ]
    rows += [
        (f"FVU {name}", number(value, 4), f"unexplained share of the variance of {name}, unit free: 0 perfect, 1 no better than the mean")
        for name, value in (trained.get("fvu") or {}).items()
    ]
    rows += [
        (
            "Mean entropy",
            number(_mean(codes["entropy"])),
            f"nats, over codebooks, PAD excluded; cap ln {codes['codebook_size']} = {number(math.log(codes['codebook_size']))}",
        ),
        ("Mean utilisation", share(_mean(codes["utilisation"]), 2), "share of codes used by at least one item, over codebooks"),
        ("Perplexity, lowest", number(min(codes["perplexity"]), 1), "exp(entropy): codes that carry the load, worst codebook"),
        ("Perplexity, mean", number(_mean(codes["perplexity"]), 1), "over codebooks"),
        ("Top-1 load, highest", share(max(codes["top1"])), "share of items on the most used code of a codebook"),
        (
            "Entropy of whole IDs",
            number(codes["sid_entropy"]),
            f"nats over complete IDs; cap ln {count(items)} = {number(math.log(max(1, items)))}",
        ),
        ("Collision rate by IDs", share(codes["collision_distinct"], 2), f"(M − distinct) / M, M = {plural(items, 'item')}"),
        ("Collision rate by items", share(codes["collision_items"], 2), "share of items whose ID another item has too"),
        ("Distinct IDs", count(distinct), f"{share(distinct / items if items else None, 2)} of the items"),
        ("Largest group", count(codes["largest_group"]), "items that share one ID"),
        ("PAD rate", share(_mean(codes["pad"]), 2), "share of codes left empty because the item lacks the modality, over slots"),
    ]
    return Table("Code metrics", ("Metric", "Value"), [row[:2] for row in rows], notes=[row[2] for row in rows])


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


_CURVES: tuple[tuple[str, str, Callable[[Sequence[Row], Any], Figure], str, str], ...] = (
    (
        *("tokenizer_losses", "loss", lambda rows, size: figures.losses(rows)),
        "Lines of the total loss and of its parts over the epochs of training.",
        "The total should fall and level off. Parts are drawn before their weights; those below a thousandth of the largest are left out.",
    ),
    (
        *("tokenizer_fvu", "fvu_", lambda rows, size: figures.unexplained(rows)),
        "Unexplained variance of each modality over epochs.",
        "Lower is better: how much of each modality the codes fail to carry; 1 is no better than the mean.",
    ),
    (
        *("tokenizer_sparsity", "sparsity", lambda rows, size: figures.sparsity(rows)),
        "Above: share of inactive behaviour slots and its target over epochs. Below: the weight λ of the sparsity loss, logarithmic.",
        "λ rises while too many slots are active and falls when too few are; the two lines above should meet.",
    ),
    (
        *("tokenizer_use", "utilisation", figures.code_use),
        "Above: share of codes in use over epochs. Below: entropy of code use with its cap.",
        "Codes in use should reach 100 % and stay there; entropy near the cap means that they are used evenly.",
    ),
)
"""Name of the figure, start of the metric that it needs, how to draw it from rows and codebook size, alt text, caption."""


def tokenizer(material: Material) -> Section:
    """How the tokenizer learned."""
    key, title, training = "tokenizer", "Training of the tokenizer", material.tokenizer
    if not training:
        return Section(key, title, missing=NOT_RUN)
    rows, facts = training.rows, training.facts
    size = (facts.get("config") or {}).get("codebook_size") or material.codes.get("codebook_size")
    present = {name for row in rows for name, value in row.items() if value is not None}
    plots = [
        Plot(name, draw(rows, size), alt, text) for name, needs, draw, alt, text in _CURVES if any(metric.startswith(needs) for metric in present)
    ]
    last, controller = rows[-1] if rows else {}, facts.get("controller") or {}
    table = [
        ("Method", plain(facts.get("tokenizer"))),
        ("Parameters", count(facts.get("parameters"))),
        ("Epochs", count(last.get("epoch"))),
        ("Steps", count(last.get("step"))),
        ("Share of time waiting for data, mean", share(_mean(figures.series(rows, "wait_share")[1].tolist()))),
        ("Alignment α", number(controller.get("alpha"), 2)),
        ("Alignment β", number(controller.get("beta"), 2)),
    ]
    tables = [Table("The training", ("Quantity", "Value"), [row for row in table if row[1] != DASH])]
    lead = (
        ""
        if material.same_tokenizer
        else "These curves are not those of the generation shown above: its tokenizer's folder is not there, so the newest one is shown."
    )
    return Section(key, title, lead, plots, tables)


def stages(material: Material) -> Section:
    """Wall time of each stage's last run."""
    key, title, rows = "stages", "Stages and wall time", last_stages(material.stages)
    if not rows:
        return Section(key, title, missing=NOT_RUN)
    table = [(" ".join(filter(None, (row["stage"], part(row)))), str(row.get("status", DASH)), seconds(row.get("seconds"))) for row in rows]
    total = sum(row["seconds"] for row in rows if known(row.get("seconds")))
    lead = "A stage that was up to date had nothing to do." if any(row.get("status") == "up to date" for row in rows) else ""
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
    """From what exactly all this was made."""
    generation, facts = material.generation or {}, (material.tokenizer.facts if material.tokenizer else {})
    rows = [("Run", material.cfg.name), ("Configuration digest", digest(material.cfg)), ("Seed", str(facts.get("seed", material.cfg.seed)))]
    if generation:
        rows += [
            ("Generation", f"{generation['generation']} (sids version {generation['sids_version']}, run {generation['run']})"),
            ("Tokenizer of the generation", generation["tokenizer"]),
        ]
    if facts.get("digest") and facts["digest"] != generation.get("tokenizer"):
        rows.append(("Tokenizer shown", str(facts["digest"])))
    versions = {
        "The generation read": generation.get("inputs"),
        "The tokenizer was trained on": facts.get("inputs"),
        "This report read": material.versions,
    }
    rows += [(name, listed([f"{table} v{version}" for table, version in tables.items()])) for name, tables in versions.items() if tables]
    rows += [(f"Library {name}", str(version)) for name, version in (facts.get("versions") or {}).items()]
    return Section("provenance", "Provenance", tables=[Table("Inputs, seed and versions", ("What", "Value"), rows, words=2)])


ALL = (catalogue, behavior, weights, semantic_ids, tokenizer, stages, provenance)
