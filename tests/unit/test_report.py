"""Test the report: figures draw their input, the page is complete, self-contained and escaped, and missing parts
leave a line.

The last tests write a real lake and a real MLflow store (no JVM, no Ray).
"""

from __future__ import annotations

import dataclasses
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from adasid.config import build as configure
from adasid.errors import InputError
from adasid.report import curves, figures, page, sections, style, summary, words
from adasid.report.material import Material, Training
from adasid.tables import CATALOG_STATS, GENERATIONS, ITEM_STATS, LIVE, RICHNESS_STATS

ITEMS, K = 2_000, 50
UNKNOWN = dict.fromkeys(
    ("norm_low", "norm_high", "norm_quantiles", "norm_by_count", "spearman", "richness_source", "richness_quantiles")
)
SLOTS = ["s0", "t0", "v0", "b0", "b1", "b2"]


def catalog(**changes: Any) -> dict[str, Any]:
    rank = np.unique(np.geomspace(1, ITEMS, 100).astype(int))
    events = np.maximum(0, np.floor(3_000 / rank**0.9 - 3)).astype(int)
    grid = np.linspace(0, 1, 101)
    bins = np.geomspace(1, 2_000, 12)
    row = {
        "input_hash": "demo",
        "items": ITEMS,
        "users": 1_500,
        "interactions": 30_211,
        "train_interactions": 27_211,
        "duplicates": 12,
        "rejected": {"no item_id": 7, "time in the future": 2},
        "strata": {"head": 500, "mid": 980, "tail": 490, "cold": 30},
        "gini": 0.682,
        "head_interactions": 0.744,
        "popularity": [{"x": float(x), "y": float(y)} for x, y in zip(rank, events)],
        "lorenz": [{"x": float(x), "y": float(x**4)} for x in grid],
        "norm_low": 0.31,
        "norm_high": 2.75,
        "norm_quantiles": [{"x": float(q), "y": 0.3 + q / 40} for q in range(0, 101, 5)],
        "norm_by_count": [
            {
                "x": float(x),
                "items": 150,
                "p10": math.log(x + 1) * 0.2,
                "p50": math.log(x + 1) * 0.3,
                "p90": math.log(x + 1) * 0.36,
            }
            for x in bins
        ],
        "spearman": 0.523,
        "richness_source": "norm",
        "richness_quantiles": [{"x": float(q), "y": (q / 100) ** 1.6} for q in range(101)],
    }
    return {**row, **changes}


def codes() -> dict[str, Any]:
    random = np.random.default_rng(0)
    counts = [
        random.multinomial(ITEMS if slot[0] != "v" else 1_900, random.dirichlet(np.full(K, 4.0))).tolist()
        for slot in SLOTS
    ]
    counts[5][0] = 0
    shares = [np.array(row) / sum(row) for row in counts]
    entropy = [float(-(p[p > 0] * np.log(p[p > 0])).sum()) for p in shares]
    strata = ("head", "mid", "tail", "cold")
    weights = {
        name: [1.0, 1.0, 1.0, *(level * share for share in (0.9, 0.7, 0.4))]
        for name, level in zip(strata, (0.9, 0.6, 0.3, 0.0))
    }
    active = {
        name: [1.0, 1.0, 1.0, *(level * share for share in (1.0, 0.8, 0.6))]
        for name, level in zip(strata, (0.97, 0.8, 0.5, 0.0))
    }
    return {
        "slots": SLOTS,
        "codebook_size": K,
        "codes": counts,
        "pad": [0, 0, 0.05, 0, 0, 0],
        "entropy": entropy,
        "utilisation": [float((p > 0).mean()) for p in shares],
        "perplexity": [math.exp(h) for h in entropy],
        "top1": [float(p.max()) for p in shares],
        "sid_entropy": 7.51,
        "items": ITEMS,
        "distinct": 1_890,
        "collision_distinct": 0.055,
        "collision_items": 0.094,
        "largest_group": 9,
        "group_sizes": [[1, 1812], [2, 61], [3, 14], [5, 2], [9, 1]],
        "weights_by_stratum": weights,
        "active_by_stratum": active,
        "active_count_by_stratum": {
            "head": [0.02, 0.1, 0.3, 0.58],
            "mid": [0.1, 0.3, 0.4, 0.2],
            "tail": [0.3, 0.4, 0.2, 0.1],
            "cold": [1, 0, 0, 0],
        },
    }


def generation(**changes: Any) -> dict[str, Any]:
    gates = [
        {"gate": "coverage", "value": 1.0, "threshold": 1.0, "passed": True},
        {"gate": "largest group", "value": 9, "threshold": 1000, "passed": True},
    ]
    row = {
        "generation": 3,
        "sids_version": 5,
        "inputs": {"item_features": 4},
        "tokenizer": "0123456789abcdef",
        "run": "demo",
        "items": ITEMS,
    }
    row |= {"gates": gates, "metrics": codes(), "live": True}
    return {**row, **changes}


def behavior() -> Training:
    rows = [
        {
            "epoch": e,
            "loss": 7 - math.log(e + 1),
            "validation_recall@10": 0.08 * rise,
            "test_recall@10": 0.075 * rise,
            "spearman": 0.6 - 0.02 * e,
            "seconds": 2.0,
        }
        for e, rise in ((e, 1 - math.exp(-e / 6)) for e in range(1, 21))
    ]
    scores = {f"{metric}@{n}": n / 200 for metric in ("ndcg", "recall") for n in (5, 10, 20)}
    return Training(
        rows,
        {
            "best_epoch": 17,
            "early_epoch": 3,
            "norm_checkpoint": "early",
            "spearman": 0.54,
            "test": scores,
            "validation": scores,
            "users": 1_500,
        },
    )


def tokenizer() -> Training:
    rows = [
        {
            "epoch": e,
            "step": e * 20,
            "loss": 1 / e + 0.4,
            "reconstruction": 0.8 / e + 0.2,
            "codebook": 0.2,
            "alignment": 3 / e + 1,
            "routing": 1e-6 * e,
            "sparsity": min(1 / 3, e / 90),
            "sparsity_target": 1 / 3,
            "lambda": 1e-8 * 1.2 ** min(e, 60),
            "utilisation": min(1.0, 0.7 + e / 100),
            "entropy": 3.0 + 0.8 * (1 - math.exp(-e / 20)),
            "fvu_text": 0.3 + 1 / e,
            "fvu_visual": 0.35 + 0.8 / e,
            "fvu_behavior": 0.5 + 0.7 / e,
            "wait_share": 0.004,
            "seconds": e * 3.1,
        }
        for e in range(5, 201, 5)
    ]
    kinds = {"s": "shared", "t": "text", "v": "visual", "b": "behavior"}
    manifest = {
        "tokenizer": "adc-sid",
        "digest": "0123456789abcdef",
        "config": {"codebook_size": K},
        "slots": [{"name": name, "kind": kinds[name[0]]} for name in SLOTS],
        "controller": {"alpha": 10.0, "beta": 6.41},
        "metrics": {"reconstruction": 0.2041, "fvu": {"text": 0.305, "visual": 0.354, "behavior": 0.5035}},
        "inputs": {"item_features": 4},
        "seed": 17,
        "versions": {"torch": "2.15.0", "adasid": "0.1.0"},
        "parameters": 1_234_567,
    }
    return Training(rows, manifest)


def stages() -> list[dict[str, Any]]:
    return [
        {"stage": "build_features", "status": "done", "seconds": 41.2, "facts": {"items": ITEMS, "rejected": 9}},
        {"stage": "train", "status": "done", "seconds": 300.0, "facts": {"part": "behavior", "epochs": 22}},
        {"stage": "train", "status": "done", "seconds": 75.5, "facts": {"part": "behavior", "epochs": 20}},
        {"stage": "train", "status": "done", "seconds": 620.4, "facts": {"part": "tokenizer", "epochs": 200}},
        {"stage": "report", "status": "done", "seconds": 5.0, "facts": {}},
    ]


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made but not rasterised, which takes most of the time."""
    monkeypatch.setattr(style, "png", lambda figure: b"\x89PNG")


def material(**changes: Any) -> Material:
    whole = Material(
        configure({"name": "demo"}),
        catalog(),
        generation(),
        None,
        behavior(),
        tokenizer(),
        stages(),
        {"catalog_stats": 1, "generations": 2},
        "2025-01-02 03:04 UTC",
    )
    quality = {"sample": 400, "effective_rank": 31.2, "near_duplicates": 0.07, "agreement": 0.61, "chance": 0.04}
    quality |= {"neighbours": 10, "near_duplicate": 0.95}
    content = [{"input_hash": "x", "modality": "text", "items": 1900, "missing": 100, **quality}]
    whole = dataclasses.replace(whole, content=content, refused_contents={"truncated": 3})
    return dataclasses.replace(whole, **changes)


class Reader(HTMLParser):
    """Collects tags and text, and checks that what is opened is closed."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "hr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_page_is_whole_and_self_contained() -> None:
    html, pictures = page.render(summary.build(material()))
    read = Reader(html)
    assert [section["id"] for section in read.all("section")] == [
        "catalogue",
        "content",
        "behaviour",
        "weights",
        "sids",
        "tokenizer",
        "stages",
        "provenance",
    ]
    assert len(read.all("h1")) == 1 and "class" not in {name for section in read.all("section") for name in section}
    for forbidden in ("http://", "https://", "<script", "<link", "@import", "url("):
        assert forbidden not in html
    images = read.all("img")
    assert len(images) == len(pictures) == len(read.all("figcaption")) == 15
    assert all(
        len(image["alt"] or "") > 40 and (image["src"] or "").startswith("data:image/png;base64,iVBOR")
        for image in images
    )
    assert all(data.startswith(b"\x89PNG") for data in pictures.values()) and all(
        name.endswith(".png") for name in pictures
    )
    assert all(plot.caption.endswith((".", ".)")) for plot in summary.build(material()).plots())
    assert "Not run yet" not in read.text and "nan" not in read.text.lower().split()
    numbers = (
        "2,000 items",
        "0.682",
        "74.4 %",
        "5.50 %",
        "9.40 %",
        "0.2041",
        "no item_id",
        "build_features",
        "train behavior",
        "0123456789abcdef",
        "item_features v4",
        "12 min 17 s",
        "61.0 %",
        "truncated",
    )
    for expected in numbers:
        assert expected in read.text.replace(words.SPACE, " "), expected
    assert "5 min" not in read.text.replace(words.SPACE, " ")  # an earlier run of the same part does not count


def test_warnings_name_what_is_off(undrawn: None) -> None:
    failed = [{"gate": "collision", "value": 0.61, "threshold": 0.5, "passed": False}]
    fallen = material(
        catalog=catalog(richness_source="count", spearman=-0.31),
        refused=generation(generation=4, gates=failed, live=False),
    )
    text = " ".join(summary.warnings(fallen)).replace(words.SPACE, " ")
    said = (
        "gate collision failed, 0.61 against a threshold of 0.5",
        "Generation 4 is newer but not live",
        "slot b2 (98.0 %)",
        "fell back to the count",
        "−0.31",
        "9 input rows rejected",
    )
    for expected in said:
        assert expected in text, expected
    clean = material(catalog=catalog(rejected={}), generation=generation(metrics={**codes(), "utilisation": [1.0] * 6}))
    assert summary.warnings(clean) == []
    assert "Look at this first" not in page.render(summary.build(clean))[0]
    other = material(tokenizer=Training(tokenizer().rows, {**tokenizer().facts, "digest": "another"}))
    assert any("another tokenizer" in warning for warning in summary.warnings(other))
    assert (
        "0.2041" not in Reader(page.render(summary.build(other))[0]).text
    )  # its reconstruction is not the generation's


@pytest.mark.parametrize(
    "missing, line",
    [
        ({"catalog": None}, words.NOT_RUN),
        ({"generation": None}, "Nothing published yet."),
        ({"tokenizer": None}, words.NOT_RUN),
        ({"stages": []}, words.NOT_RUN),
        ({"catalog": None, "behavior": None}, "The behaviour model is not trained yet."),
        ({"generation": None, "tokenizer": None, "behavior": None, "catalog": catalog(**UNKNOWN)}, "not trained yet"),
        (
            {
                "behavior": None,
                "cfg": configure({"behavior": {"source": "column"}, "source": {"synthetic": {"behavior_width": 64}}}),
            },
            words.BROUGHT,
        ),
    ],
)
def test_missing_parts_leave_a_line(undrawn: None, missing: dict[str, Any], line: str) -> None:
    read = Reader(page.render(summary.build(material(**missing)))[0])
    assert line in read.text
    assert len(read.all("section")) == len(sections.ALL)


def test_everything_missing_still_renders(undrawn: None) -> None:
    empty = Material(configure({}))
    assert empty.empty and not material().empty
    Reader(page.render(summary.build(empty))[0])


def test_values_are_escaped(undrawn: None) -> None:
    evil = "<script>alert('x')</script>$a$"
    html, _ = page.render(
        summary.build(
            material(
                catalog=catalog(rejected={evil: 3}),
                stages=[{"stage": evil, "status": "done", "seconds": 1.0, "facts": {evil: evil}}],
            )
        )
    )
    assert "<script" not in html and evil in Reader(html).text
    marked = generation(metrics={**codes(), "slots": ["s0", "t0", "$v$_<b>", "b0", "b1", "b2"]})
    assert "<b>" not in page.render(summary.build(material(generation=marked)))[0]


def data(axes: Any, line: int = 0) -> tuple[np.ndarray, np.ndarray]:
    x, y = axes.lines[line].get_data()
    return np.asarray(x, float), np.asarray(y, float)


def test_catalogue_figures_plot_their_input() -> None:
    stats = catalog()
    x, y = data(figures.popularity(stats["popularity"], 500).axes[0])
    assert [(a, b) for a, b in zip(x, y)] == [(p["x"], p["y"]) for p in stats["popularity"] if p["y"] > 0]
    x, y = data(figures.lorenz(stats["lorenz"], 0.682).axes[0], 1)
    assert np.allclose(y, x**4) and len(x) == 101
    axes = figures.norm_by_count(stats["norm_by_count"], 0.5).axes[0]
    assert np.allclose(data(axes)[1], [p["p50"] for p in stats["norm_by_count"]])
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert math.isclose(band.max(), stats["norm_by_count"][-1]["p90"])


def test_alignment_weight_is_the_papers() -> None:
    w = figures.alignment_weight(np.array([0, 0.5, 0.7, 0.8, 0.9, 1]), 10, 9)
    assert np.allclose(w, [0.0002, 0.025, 0.16, 0.37, 0.68, 1], atol=0.006)
    figure = figures.alignment((10.0, 6.0), catalog()["richness_quantiles"])
    above, below = figure.axes
    x, y = data(above)
    assert np.allclose(y, figures.alignment_weight(x, 10.0, 6.0)) and len(above.lines) == 1 + len(figures.PAPERS)
    heights = np.array([bar.get_height() for bar in below.patches])
    assert math.isclose(heights.sum(), 1) and math.isclose(heights[:20].sum(), 0.5 ** (1 / 1.6), abs_tol=0.02)
    assert len(figures.alignment(None, catalog()["richness_quantiles"]).axes[0].lines) == len(figures.PAPERS)
    assert np.all(data(figures.alignment(None, catalog()["richness_quantiles"], flat=True).axes[0])[1] == 1)


def test_code_figures_plot_their_input() -> None:
    metrics = codes()
    usage = figures.usage(SLOTS, metrics["codes"], metrics["utilisation"], metrics["entropy"])
    assert [axes.get_title(loc="left") for axes in usage.axes] == SLOTS
    for axes, counts in zip(usage.axes, metrics["codes"]):
        assert data(axes)[1][0] == np.mean(counts)
        assert axes.collections[0].get_paths()[0].vertices[:, 1].max() == max(counts)
    axes = figures.groups(metrics["group_sizes"], 0.055, 0.094, 9).axes[0]
    assert np.allclose(
        [[bar.get_x() + bar.get_width() / 2, bar.get_height()] for bar in axes.patches], metrics["group_sizes"]
    )
    values = {"head": [0.9, 0.6], "cold": [0.0, 0.1]}
    bars = figures.by_stratum(values, ["b0", "b1"], "t", "y").axes[0].patches
    assert [bar.get_height() for bar in bars] == [0.9, 0.0, 0.6, 0.1]
    stacked = figures.active_counts({"head": [0.25, 0.75], "cold": [1.0]}).axes[0].patches
    assert [(bar.get_x(), bar.get_width()) for bar in stacked] == [(0, 0.25), (0, 1.0), (0.25, 0.75), (1.0, 0.0)]


def test_router_rows_may_hold_all_slots_or_behaviour_slots_only() -> None:
    short = {name: row[3:] for name, row in codes()["weights_by_stratum"].items()}
    for metrics in (codes(), {**codes(), "weights_by_stratum": short}):
        shown = sections.codes._strata(material(generation=generation(metrics=metrics)), "weights_by_stratum")
        assert shown == short


def test_training_figures_plot_their_input() -> None:
    rows = behavior().rows
    axes = curves.recall(rows, 17, 3).axes[0]
    assert data(axes)[1].tolist() == [row["validation_recall@10"] for row in rows] and data(axes, 1)[1].tolist() == [
        row["test_recall@10"] for row in rows
    ]
    assert data(axes, 2)[0].tolist() == [17, 17] and data(axes, 3)[0].tolist() == [3, 3]
    assert data(curves.spearman(rows, 17, 3, 0.2).axes[0])[1].tolist() == [row["spearman"] for row in rows]
    rows = tokenizer().rows
    above, below = curves.sparsity(rows).axes
    assert data(above)[1].tolist() == [row["sparsity"] for row in rows] and data(below)[1].tolist() == [
        row["lambda"] for row in rows
    ]
    assert data(curves.losses(rows).axes[0])[1].tolist() == [row["loss"] for row in rows]
    assert [line.get_label() for line in curves.unexplained(rows).axes[0].lines] == ["text", "visual", "behavior"]
    assert data(curves.code_use(rows, K).axes[0])[1].tolist() == [row["utilisation"] for row in rows]


def test_series_skips_gaps_and_repeats() -> None:
    rows = [
        {"epoch": 1, "a": 2.0},
        {"epoch": 2},
        {"epoch": 3, "a": None},
        {"epoch": 4, "a": float("nan")},
        {"epoch": 5, "a": 9},
        {"epoch": 5, "a": [1, 2]},
        {"a": 3},
    ]
    x, y = curves.series(rows, "a")
    assert x.tolist() == [1, 5] and y.tolist() == [2.0, 1.5]
    assert all(len(part) == 0 for part in curves.series([], "a"))


def test_words() -> None:
    assert words.count(12345) == "12,345" and words.count(None) == words.number(float("nan")) == words.DASH
    text = [words.share(x).replace(words.SPACE, " ") for x in (0, 0.5, 0.123456, 0.99999, 1, 0.00001)]
    assert text == ["0 %", "50.0 %", "12.3 %", "> 99.9 %", "100 %", "< 0.1 %"]
    assert words.number(-0.5, 2) == "−0.50" and words.number(0.00001) == "1.0e−05"
    assert [words.seconds(x).replace(words.SPACE, " ") for x in (2.04, 75, 3723)] == [
        "2.0 s",
        "1 min 15 s",
        "1 h 2 min",
    ]
    assert words.listed(["a"]) == "a" and words.listed(["a", "b", "c"]) == "a, b and c"
    assert words.plain({"a": [1, 2.5, True, None]}) == "a 1, 2.5, True, –"


# Below: the stage itself, with a real lake and a real MLflow store.


def write_run(cfg: Any, lake: Any) -> None:
    stats = catalog()
    stats = {**stats, "rejected": list(stats["rejected"].items()), "strata": list(stats["strata"].items())}
    lake.write_rows("catalog_stats", CATALOG_STATS, [stats], "d1")
    lake.write("item_stats", ITEM_STATS, ITEM_STATS.empty_table().to_batches(), "d1")
    lake.write_rows("richness_stats", RICHNESS_STATS, [stats], "d1", lake.versions("item_stats"))
    published = [
        generation(),
        generation(
            generation=4, live=False, gates=[{"gate": "collision", "value": 0.6, "threshold": 0.5, "passed": False}]
        ),
    ]
    more = {"parent": None, "artifact": "a", "run_date": None, "policy": "full", "drift": "{}", "churn": "{}"}
    plain = [
        {
            **more,
            **{
                name: json.dumps(value) if name in {"inputs", "gates", "metrics"} else value
                for name, value in row.items()
            },
        }
        for row in published
    ]
    plain = [{name: value for name, value in row.items() if name != "live"} for row in plain]
    lake.write("live", LIVE, pa.Table.from_pylist([{"generation": 3, "sids_version": 5}], LIVE).to_batches(), "d2")
    lake.write("generations", GENERATIONS, pa.Table.from_pylist(plain, GENERATIONS).to_batches(), "d2")
    for kind, name, training, facts in (
        ("behavior", "aaaa", behavior(), "result.json"),
        ("tokenizer", "0123456789abcdef", tokenizer(), "model/manifest.json"),
        ("tokenizer", "newer", Training([], {"digest": "newer", "tokenizer": "adc-sid"}), "model/manifest.json"),
    ):
        folder = cfg.run_dir / "artifacts" / kind / name
        (folder / facts).parent.mkdir(parents=True)
        (folder / facts).write_text(json.dumps(training.facts))
        (folder / "metrics.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in training.rows) + '{"epoch": 999, "lo'
        )
    with (cfg.run_dir / "stages.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in stages())


def test_stage_from_nothing_to_the_whole_run(undrawn: None, make_config: Any) -> None:
    from pipelines import report
    from pipelines.engines.tracking import stage

    cfg = make_config(name="demo")
    folder = cfg.run_dir / "report"

    def run(prepare: Any = lambda lake: None) -> tuple[Any, str]:
        with stage(cfg, "report") as context:
            prepare(context.lake)
            report.run(cfg, context)
        return context, (folder / "index.html").read_text(encoding="utf-8")

    with pytest.raises(InputError, match=r"nothing to report .* run a stage first"):
        run()

    early = catalog(rejected=[], strata=[("head", 500), ("mid", 1500)], **UNKNOWN)
    text = Reader(run(lambda lake: lake.write_rows("catalog_stats", CATALOG_STATS, [early], "d"))[1]).text
    assert "No semantic IDs are published yet." in text and "The behaviour model is not trained yet." in text

    (folder / "stale.png").write_bytes(b"")
    context, html = run(lambda lake: write_run(cfg, lake))
    read = Reader(html)
    assert len(read.all("img")) == len(list(folder.glob("*.png"))) == 15
    assert "Generation 3 gives" in read.text and "Generation 4 is newer" in read.text and "0.2041" in read.text
    stored = context.client.get_run(context.run_id)
    assert (
        stored.info.status == "FINISHED"
        and stored.data.tags["in.generations"] == "0"
        and stored.data.tags["in.catalog_stats"] == "1"
    )
    assert "report/index.html" in {file.path for file in context.client.list_artifacts(context.run_id, "report")}
    cut = html.index(", made ")
    assert run()[1][:cut] == html[:cut]  # once more: the same page but for the clock


def test_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    from pipelines.report import _rows

    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 1}\n{"epo\n{"epoch": 3}\n')
    with pytest.raises(InputError, match="line 2"):
        _rows(path)
    path.write_text('{"epoch": 1}\n{"epo')
    assert _rows(path) == [{"epoch": 1}]


def test_alignment_curve_is_that_of_the_trained_tokenizer() -> None:
    assert material().controller == (10.0, 6.41) and material().controlled
    assert material(tokenizer=None).controller is None  # beta is calibrated by training
    assert material(tokenizer=None, cfg=configure({"tokenizer": {"controller": {"beta": 9.0}}})).controller == (
        10.0,
        9.0,
    )
    off = material(tokenizer=Training([], {"controller": {"alpha": 10.0, "beta": 9.0, "enabled": False}}))
    assert not off.controlled and "switched off" in sections.weights(off).plots[0].caption
