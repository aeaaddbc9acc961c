"""Build the top of the page: the results in words and a few numbers, and warnings."""

from __future__ import annotations

from adasid.report import nights, sections
from adasid.report.material import Material
from adasid.report.page import Page
from adasid.report.words import count, known, listed, number, plain, plural, share


def build(material: Material) -> Page:
    """Build the whole report of a run."""
    footer = f"Report of run {material.cfg.name}" + (f", made {material.created}." if material.created else ".")
    return Page(
        f"Semantic IDs: {material.cfg.name}",
        summary(material),
        warnings(material),
        headline(material),
        [section(material) for section in sections.ALL],
        footer,
        [("Look inside: search items, see their codes, what codes have in common, and a map", "explore/index.html")]
        if material.explore
        else [],
    )


def summary(material: Material) -> list[str]:
    """Return two to four plain sentences with the most important numbers."""
    said, stats, codes = [], material.catalog, material.codes
    if stats:
        said.append(
            f"The catalogue has {plural(stats['items'], 'item')}, {plural(stats['users'], 'user')} and "
            f"{plural(stats['interactions'], 'event')}. "
            f"Its {plural(stats['strata'].get('head', 0), 'most popular item')} take "
            f"{share(stats['head_interactions'])} of the training events (Gini {number(stats['gini'], 2)})."
        )
        if known(stats.get("spearman")):
            by_norm = stats["richness_source"] == "norm"
            source = "norm of its behaviour embedding" if by_norm else "number of its events"
            said.append(
                f"How much is known about an item is measured by the {source}; "
                f"norm and count have a rank correlation of {number(stats['spearman'], 2)}."
            )
    if codes and material.generation:
        name = (
            f"{'Generation' if material.published else 'The unpublished generation'} "
            f"{material.generation['generation']}"
        )
        said.append(
            f"{name} gives {plural(codes['items'], 'item')} {plural(codes['distinct'], 'distinct ID')} of "
            f"{plural(len(codes['slots']), 'code')}; "
            f"{share(codes['collision_items'])} of the items share theirs, and at most "
            f"{count(codes['largest_group'])} have one ID. "
            f"{share(sum(codes['utilisation']) / len(codes['utilisation']), 2)} of the {len(codes['slots'])} × "
            f"{codes['codebook_size']} codes are in use."
        )
    elif stats:
        said.append("No semantic IDs are published yet.")
    return said


def headline(material: Material) -> list[tuple[str, str]]:
    """Return the few figures in large type."""
    stats, codes = material.catalog, material.codes
    numbers = (
        [("Items", count(stats["items"])), ("Users", count(stats["users"])), ("Events", count(stats["interactions"]))]
        if stats
        else []
    )
    if codes:
        numbers += [
            ("Distinct IDs", count(codes["distinct"])),
            ("Items sharing an ID", share(codes["collision_items"])),
            ("Codes in use", share(sum(codes["utilisation"]) / len(codes["utilisation"]))),
        ]
    return numbers


def warnings(material: Material) -> list[str]:
    """Return one plain sentence for each problem."""
    stats, codes, said = material.catalog, material.codes, []
    for row, name in ((material.generation, "shown here"), (material.refused, "the newest")):
        for gate in row["gates"] if row else ():
            if not gate["passed"]:
                assert row is not None
                failed = f"was overruled by {gate['overruled']}" if "overruled" in gate else "failed"
                limit = f"{plain(gate['value'])} against a threshold of {plain(gate['threshold'])}"
                said.append(f"Generation {row['generation']} ({name}): gate {gate['gate']} {failed}, {limit}.")
    said += [f"{line[:1].upper()}{line[1:]}." for line in material.lags]
    if material.generation and material.generation.get("hold"):
        said.append(nights.on_hold(material.generation))
    if material.refused:
        said.append(
            f"Generation {material.refused['generation']} is newer but not live; the page shows the one that is."
        )
    if material.generation and not material.published:
        said.append("No generation is live: the codes shown were refused.")
    unused = [
        f"{slot} ({share(used)})"
        for slot, used in zip(codes.get("slots", ()), codes.get("utilisation", ()))
        if used < 1
    ]
    if unused:
        said.append(f"Not all codes are in use in {'slot' if len(unused) == 1 else 'slots'} {listed(unused)}.")
    if stats and stats.get("richness_source") == "count":
        said.append(
            f"Richness fell back to the count: Spearman(norm, count) is {number(stats['spearman'], 2)}, below "
            f"{material.cfg.features.proxy_min_spearman:g}, "
            "so the norm says little about how well an item is known."
        )
    rejected = {reason: rows for reason, rows in (stats["rejected"] if stats else {}).items() if rows}
    if rejected:
        reasons = ", ".join(
            f"{reason} {count(rows)}" for reason, rows in sorted(rejected.items(), key=lambda pair: -pair[1])
        )
        said.append(
            f"{plural(sum(rejected.values()), 'input row')} rejected ({reasons}); table rejected_rows keeps them whole."
        )
    if not material.same_tokenizer:
        said.append("The training curves belong to another tokenizer than the one that wrote the generation shown.")
    return said
