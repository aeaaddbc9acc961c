"""Build the sections on the results: alignment and routing, and the semantic IDs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from adasid.report import figures
from adasid.report.material import Material, Row
from adasid.report.page import Plot, Section, Table
from adasid.report.words import NOT_RUN, count, mean, number, plain, plural, share
from adasid.tables import STRATA


def weights(material: Material) -> Section:
    """Show how strongly content is aligned with behaviour, and how many behaviour codes an item gets."""
    key, title, stats = "weights", "Alignment and routing by popularity", material.catalog or {}
    if not material.routed:
        return Section(
            key,
            title,
            missing=f"The tokenizer {material.cfg.tokenizer.name} has neither an alignment controller nor a router.",
        )
    plots: list[Plot] = []
    quantiles, controller, enabled = stats.get("richness_quantiles"), material.controller, material.controlled
    if quantiles:
        if not enabled:
            text = "The controller is switched off, so every item is aligned with full strength."
        elif controller:
            weak = float(np.mean(figures.alignment_weight(figures.sample(quantiles), *controller) < 0.05))
            text = (
                f"Items under the flat part of the blue curve are hardly aligned: {share(weak)} of the items have "
                "a "
                "weight below 0.05."
            )
        else:
            text = "This run's own curve is not known before the tokenizer is trained."
        plots.append(
            Plot(
                "alignment",
                figures.alignment(controller, quantiles, flat=not enabled),
                "Above: sigmoid curves of the alignment weight over richness, this run and four settings of the "
                "papers. Below: histogram of the richness of the items.",
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
            "In the papers, popular items have larger weights than rare ones; cold items have no behaviour, so their "
            "weight is 0.",
        ),
        (
            "router_active",
            "active_by_stratum",
            "Active behaviour slots by stratum",
            "share of items with slot active",
            "The share of items for which each behaviour slot is active, from the most to the least popular stratum.",
        ),
    ):
        values = _strata(material, metric)
        if values:
            drawing = figures.by_stratum(
                values, list(material.behavior_slots.values()), heading, label, shares=metric == "active_by_stratum"
            )
            less = bool(np.mean(values.get("head", 1)) < np.mean(values.get("tail", 0)))
            plots.append(
                Plot(
                    name,
                    drawing,
                    f"Grouped bars, one group a stratum ({', '.join(values)}), one bar a behaviour slot: {label}.",
                    text + " Here it is the reverse." * (less and name == "router_weights"),
                )
            )
    counts = _ordered(material.codes.get("active_count_by_stratum") or {})
    if counts and material.behavior_slots:
        means = [
            f"{name} {number(sum(index * value for index, value in enumerate(row)), 2)}" for name, row in counts.items()
        ]
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
    """Return the behaviour slots' values by stratum; rows may list all slots or the behaviour slots only."""
    slots, total = material.behavior_slots, len(material.codes.get("slots", ()))
    rows = _ordered(material.codes.get(metric) or {})
    return (
        {name: [row[index] for index in slots] if len(row) == total else list(row) for name, row in rows.items()}
        if slots
        else {}
    )


def semantic_ids(material: Material) -> Section:
    """Show the quality of the published codes: use, entropy, collisions, reconstruction, gates."""
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
            "One small chart a codebook: number of items for each code, most used first. Slots "
            f"{', '.join(codes['slots'])}; lowest utilisation {used}.",
            "A flat profile near the dashed line (even use) is good; a peak at the left means that few codes have "
            "most items. Entropy is given against its cap ln K.",
        ),
        Plot(
            "groups",
            figures.groups(
                codes["group_sizes"], codes["collision_distinct"], codes["collision_items"], codes["largest_group"]
            ),
            "Bars on logarithmic axes: number of semantic IDs that one item has, two items, three items and so on.",
            "The first bar counts items with an ID of their own; everything to its right is shared.",
        ),
    ]
    columns = ("Slot", "Utilisation", "Entropy (nats)", "of ln K", "Perplexity", "Top-1 load", "PAD")
    rows = [
        (
            *(slot, share(used), number(nats), share(None if nats is None else nats / math.log(max(2, len(counts))))),
            *(number(perplexity, 1), share(top), share(pad)),
        )
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


def _known(codes: Row) -> Row:
    """Drop the entropies of codebooks that no item has a code of."""
    names = ("entropy", "perplexity", "top1")
    return {**codes, **{name: [value for value in codes[name] if value is not None] for name in names}}


def _code_metrics(material: Material) -> Table:
    """Tabulate the metrics of methods 8.1 to 8.5, each with its definition."""
    codes = _known(material.codes)
    manifest = material.tokenizer.facts if material.tokenizer and material.same_tokenizer else {}
    trained = manifest.get("metrics") or {}
    distinct, items = codes["distinct"], codes["items"]
    rows = [
        (
            "Reconstruction loss L_recon",
            number(trained.get("reconstruction"), 4),
            trained.get("reconstruction_definition")
            or "squared error per dimension on inputs of unit variance, summed over modalities, mean over items (an "
            "absent modality counts 0), last epoch of training",
        )
    ]
    rows += [
        (
            f"FVU {name}",
            number(value, 4),
            f"unexplained share of the variance of {name}, unit free: 0 perfect, 1 no better than the mean",
        )
        for name, value in (trained.get("fvu") or {}).items()
    ]
    rows += [
        (
            "Mean entropy",
            number(mean(codes["entropy"])),
            f"nats, over codebooks, PAD excluded; cap ln {codes['codebook_size']} = "
            f"{number(math.log(codes['codebook_size']))}",
        ),
        (
            "Mean utilisation",
            share(mean(codes["utilisation"]), 2),
            "share of codes used by at least one item, over codebooks",
        ),
        (
            *("Perplexity, lowest", number(min(codes["perplexity"], default=None), 1)),
            "exp(entropy): codes in even use that have this entropy, worst codebook",
        ),
        ("Perplexity, mean", number(mean(codes["perplexity"]), 1), "over codebooks"),
        (
            *("Top-1 load, highest", share(max(codes["top1"], default=None))),
            "share of the items with a code in a codebook that have its most used one",
        ),
        (
            "Entropy of whole IDs",
            number(codes["sid_entropy"]),
            f"nats over complete IDs; cap ln {count(items)} = {number(math.log(max(1, items)))}",
        ),
        (
            "Collision rate by IDs",
            share(codes["collision_distinct"], 2),
            f"(M − distinct) / M, M = {plural(items, 'item')}",
        ),
        ("Collision rate by items", share(codes["collision_items"], 2), "share of items whose ID another item has too"),
        ("Distinct IDs", count(distinct), f"{share(distinct / items if items else None, 2)} of the items"),
        ("Largest group", count(codes["largest_group"]), "items that share one ID"),
        (
            *("PAD rate", share(mean(codes["pad"]), 2)),
            "share of the items' slots that are empty because the item lacks the modality",
        ),
    ]
    return Table("Code metrics", ("Metric", "Value"), [row[:2] for row in rows], notes=[row[2] for row in rows])
