"""Build the sections on the inputs: the catalogue and the behaviour embeddings."""

from __future__ import annotations

from collections.abc import Sequence

from adasid.report import curves, figures
from adasid.report.material import Material, Row
from adasid.report.page import Plot, Section, Table
from adasid.report.words import BROUGHT, NOT_RUN, count, known, number, plural, share
from adasid.tables import STRATA


def catalogue(material: Material) -> Section:
    """Show how events are distributed over items, and which rows were read and rejected."""
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
            "Each step right is a less popular item; the steeper the fall, the fewer items have most of the events."
            + (" Items without a training event lie below the picture." if silent else ""),
        ),
        Plot(
            "lorenz",
            figures.lorenz(stats["lorenz"], stats["gini"]),
            f"Lorenz curve of training events over items, Gini coefficient {number(stats['gini'], 2)}, below the "
            "diagonal of equality.",
            "The further the curve lies below the diagonal, the longer the tail: "
            f"the most popular {plural(strata.get('head', 0), 'item')} take {share(stats['head_interactions'])} of the "
            "training events.",
        ),
    ]
    rows = [
        ("Items", count(stats["items"])),
        ("Users", count(stats["users"])),
        ("Events kept", count(stats["interactions"])),
        ("of which training", count(stats["train_interactions"])),
        ("Duplicate events dropped", count(stats["duplicates"])),
        *_dropped(stats),
        ("Gini of training events over items", number(stats["gini"])),
        ("Share of training events on head items", share(stats["head_interactions"])),
    ]
    rows += [
        (f"Items in stratum {name}", count(strata[name]))
        for name in (*STRATA, *sorted(set(strata) - set(STRATA)))
        if name in strata
    ]
    refused = [(reason, count(rows)) for reason, rows in sorted(rejected.items(), key=lambda pair: -pair[1])] or [
        ("none", "0")
    ]
    return Section(
        key,
        title,
        plots=plots,
        tables=[
            Table("Size and concentration", ("Quantity", "Value"), rows),
            Table("Rejected input rows", ("Reason", "Rows"), refused),
        ],
    )


def _dropped(stats: Row) -> list[tuple[str, str]]:
    """Return the counts of rows that were dropped without being rejected; older tables lack these counts."""
    rows = [
        ("Events beyond features.max_user_events of their user", stats.get("capped")),
        ("Events below the k-core", stats.get("below_k_core")),
        ("Identical copies of items dropped", stats.get("duplicate_items")),
    ]
    shown = [(name, count(value)) for name, value in rows if value]
    events = stats["interactions"]
    if stats.get("tied") is not None and events:
        shown.append(
            (
                "Share of events at the time of another event of the user (ordered by a hash)",
                share(stats["tied"] / events),
            )
        )
    if stats.get("outside_histories") and events:
        shown.append(("Share of events outside histories (impressions)", share(stats["outside_histories"] / events)))
    for modality, items in sorted((stats.get("missing") or {}).items()):
        shown.append((f"Share of items without {modality}", share(items / stats["items"])))
    return shown


def content(material: Material) -> Section:
    """Show how good the vectors of text and pictures are, and which contents could not be encoded."""
    key, title, rows = "content", "Content vectors", material.content
    if not rows:
        return Section(key, title, missing=NOT_RUN)
    encoders = material.cfg.content.encoders
    quality = [
        (
            row["modality"],
            encoders[row["modality"]].model if row["modality"] in encoders else "brought by the source",
            share(row["missing"] / max(1, row["items"] + row["missing"])),
            number(row["effective_rank"], 1),
            share(row["near_duplicates"]),
            share(row["agreement"]),
            share(row["chance"]),
        )
        for row in rows
    ]
    columns = (
        "Modality",
        "Encoder",
        "Items without",
        "Effective rank",
        "Near-duplicates",
        "Neighbours agree",
        "Chance",
    )
    first = rows[0]
    lead = (
        f"Of a sample of items: near-duplicates have a cosine of at least {first['near_duplicate']:g} with another "
        f"one; neighbours agree where the {first['neighbours']} nearest are of the item's category, chance is the same "
        "of any other items."
    )
    tables = [Table("Quality of the vectors, on a sample", columns, quality, words=2)]
    if material.refused_contents:
        refused = sorted(material.refused_contents.items(), key=lambda pair: -pair[1])
        listed = [(reason, count(items)) for reason, items in refused]
        tables.append(Table("Contents that could not be encoded", ("Reason", "Items"), listed))
    return Section(key, title, lead, tables=tables)


def behavior(material: Material) -> Section:
    """Show whether the norm of the behaviour embeddings separates rich items from poor ones, and how they were
    trained."""
    key, title, stats, training = "behaviour", "Behaviour embeddings", material.catalog or {}, material.behavior
    plots: list[Plot] = []
    tables: list[Table] = []
    lead = (
        BROUGHT
        if material.cfg.behavior.source == "column"
        else ""
        if training
        else "The behaviour model is not trained yet."
    )
    if stats.get("norm_by_count"):
        fallen = stats["richness_source"] == "count"
        use = (
            f"The correlation is below {material.cfg.features.proxy_min_spearman:g}, so richness is computed from the "
            "count instead of the norm."
            if fallen
            else "Richness is computed from the norm."
        )
        plots.append(
            Plot(
                "norm",
                figures.norm_by_count(stats["norm_by_count"], stats["spearman"]),
                "Median and 10th to 90th percentile of the behaviour embedding's norm, over the number of training "
                "events of the item (logarithmic).",
                f"A rising line means that the norm tells how much is known about an item. {use}",
            )
        )
        rows = [
            ("Spearman(norm, count), items with events", number(stats["spearman"])),
            ("Richness is computed from", "the count" if fallen else "the norm"),
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
    if len(curves.series(rows, "validation_recall@10")[0]):
        plots.append(
            Plot(
                "behavior_recall",
                curves.recall(rows, best, early),
                "Recall at 10 on validation and test users for each epoch, with the chosen epochs marked.",
                f"The embeddings come from epoch {best}, the best NDCG@10 on validation; the test line was never used "
                "to choose.",
            )
        )
    if len(curves.series(rows, "spearman")[0]):
        plots.append(
            Plot(
                "behavior_spearman",
                curves.spearman(rows, best, early, material.cfg.features.proxy_min_spearman),
                "Rank correlation of embedding norm and training count for each epoch, with the chosen epochs marked.",
                f"The norm that measures richness comes from the {used} checkpoint (epoch "
                f"{early if used == 'early' else best}, Spearman {number(result.get('spearman'), 2)}).",
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
        (name, number(validation.get(name), 4), number(test.get(name), 4))
        for name in names
        if known(test.get(name)) or known(validation.get(name))
    ]
    return plots, Table(
        f"Next-item scores of the embeddings, {plural(int(result.get('users') or 0), 'user')}, full catalogue",
        ("Metric", "Validation", "Test"),
        scores,
    )
