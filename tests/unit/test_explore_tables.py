"""Test what the page of items and codes reads from the tables of a run, and that the report writes it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import torch

from adasid import config, tables
from adasid.config import RqKmeansSettings
from adasid.distributed import Workers
from adasid.tables import PAD, STRATA
from adasid.tokenizers import artifact
from pipelines import explore, migrate, report
from pipelines.engines.tracking import stage
from pipelines.publish import generations
from pipelines.publish.generations import Generation
from pipelines.run import Run
from tests.planted import catalogue, shard
from tests.unit.test_explore import unpacked
from tests.unit.test_report import generation

ITEMS, CONTENT = 600, ("text", "visual")


@pytest.fixture
def cfg(make_config):
    return make_config(name="demo", explore={"items": 100})


@pytest.fixture
def run(cfg):
    """A run with a live generation; return its codes by item_index, its histories and its tokenizer."""
    lake, random = Run(cfg).lake, np.random.default_rng(1)
    migrate.check(lake)
    planted, cluster = catalogue(ITEMS)
    strata = np.array(STRATA)[np.arange(ITEMS) * 4 // ITEMS]
    ids = [f"item {place}é" for place in random.permutation(ITEMS)]
    columns = {name: planted[name] for name in planted.column_names}
    columns |= {"item_id": ids, "stratum": strata, "title": [f"topic{c} {i}" for i, c in enumerate(cluster)]}
    columns["norm"] = pa.nulls(ITEMS, pa.float32())
    schema = tables.item_features(CONTENT)
    features = pa.table({name: columns[name] for name in schema.names}, schema)
    settings = RqKmeansSettings(levels={"text": 2, "visual": 1}, codebook_size=8, rounds=4)
    data = shard(planted, CONTENT)
    tokenizer = artifact.build(settings, data.widths)
    tokenizer.prepare(data, Workers())
    tokenizer.fit(data, Workers(), torch.Generator().manual_seed(0))
    manifest = artifact.write(Run(cfg).artifact("tokenizer", "key") / "model", tokenizer, settings, {})
    codes, weights, active = (part.numpy() for part in tokenizer.encode(data.take(np.arange(ITEMS))))
    codes[0, 0] = (codes[0, 0] + 1) % 8  # a code that was preserved though it is not the nearest
    rows = [
        {"item_id": ids[item], "codes": codes[item], "weights": weights[item], "active": active[item]}
        | {"tokens": [], "collision_rank": 0, "tokenizer": manifest.digest, "generation": 2, "fingerprint": ""}
        | {"gauges": []}
        for item in random.permutation(ITEMS)
    ]
    sids = lake.write_rows("sids", tables.SIDS, rows, "s")
    stats = lake.write("item_stats", tables.ITEM_STATS, [], "events")
    lake.write(
        "item_features", schema, features.take(random.permutation(ITEMS)).to_batches(), "f", {"item_stats": stats}
    )
    histories = [random.integers(0, ITEMS, random.integers(1, 9)).tolist() for _ in range(200)]
    events = [
        {"bucket": 0, "user_id": f"u{user}", "user_index": user, "split": split, "history": history, "target": None}
        for user, history in enumerate(histories)
        for split in ("train", "validation")
    ]
    lake.write_rows("sequences", tables.SEQUENCES, events, "events")
    lake.write_rows("sequences", tables.SEQUENCES, events[:1], "later events")
    changes = [
        {"generation": 1, "item_id": ids[0], "old_codes": [0, 0, 0], "new_codes": [1, 1, 1], "why": "warm"},
        *(
            {"generation": 2, "item_id": ids[item], "old_codes": old, "new_codes": codes[item], "why": why}
            for item, old, why in ((9, [0, 0, 0], "warm"), (7, None, "new"), (8, [1, 1, 1], "changed"))
        ),
        {"generation": 2, "item_id": "gone", "old_codes": [2, 2, 2], "new_codes": None, "why": "removed"},
    ]
    lake.write_rows("sid_changes", tables.SID_CHANGES, changes, "c")
    live = Generation(
        generation=2,
        policy="full",
        run_date=None,
        inputs={"item_features": 0},
        tokenizer=manifest.digest,
        artifact="artifacts/tokenizer/key/model",
        items=ITEMS,
        metrics=generation()["metrics"],
        gates=(),
        churn={},
        drift={},
        parent=1,
        sids_version=sids,
        run="demo",
    )
    lake.write_rows("generations", tables.GENERATIONS, [live.row()], "g")
    lake.write_rows("live", tables.LIVE, [{"generation": 2, "sids_version": sids, "hold": False}], "g")
    return codes, histories, tokenizer, data, ids


def test_the_page_says_what_the_tables_say(cfg, run, monkeypatch):
    codes, histories, _, _, ids = run
    monkeypatch.setattr(explore, "CHANGES", 3)
    lake = Run(cfg).lake
    found = explore.gather(cfg, lake, generations.live(lake), "now")
    chosen = [ids.index(item) for item in found["ids"]]
    assert len(chosen) == 100 and chosen == sorted(chosen)
    assert np.bincount(unpacked(found["stratum"])).tolist() == [25, 25, 25, 25]
    assert (unpacked(found["codes"]).reshape(-1, 3) == codes[chosen]).all()
    assert [title.split()[1] for title in found["titles"]] == [str(item) for item in chosen]
    assert found["facts"]["catalogue"] == [150, 150, 150, 150] and found["facts"]["mapped"] == "decoded"
    assert set(found["near"]) == {"text", "visual", "behavior"}
    strata = np.arange(ITEMS) * 4 // ITEMS
    for place, slot in enumerate(found["slots"]):
        sizes = unpacked(slot["items"]).reshape(8, 4)
        for code in range(8):
            assert sizes[code].tolist() == np.bincount(strata[codes[:, place] == code], minlength=4).tolist()
        moves = Counter((codes[a, place], codes[b, place]) for h in histories for a, b in zip(h, h[1:]))
        for code, following in slot["next"].items():
            best = sorted(((-n, b) for (a, b), n in moves.items() if a == code and b != PAD))[:5]
            assert [(-n.events, n.code) for n in following] == best
    assert found["changes"]["reasons"] == {"warm": 1, "new": 1, "changed": 1, "removed": 1}
    assert [(row["id"], row["why"]) for row in found["changes"]["rows"]] == [
        (ids[8], "changed"),
        (ids[9], "warm"),
        (ids[7], "new"),
    ]
    assert found["changes"]["rows"][0]["title"].endswith(" 8") and found["changes"]["rows"][2]["old"] is None


def test_the_map_is_of_the_published_codes(run):
    codes, _, tokenizer, data, _ = run
    rows = pa.table(catalogue(ITEMS)[0]).to_batches()[0].slice(0, 50)
    decoded = explore._decoded(tokenizer, rows, codes[:50])
    nearest = torch.cat(list(tokenizer.reconstruct(data.take(np.arange(50))).values()), 1).numpy()
    assert not np.allclose(decoded[0], nearest[0]) and np.allclose(decoded[1:], nearest[1:], atol=1e-5)


def test_the_report_writes_the_page_and_links_it(cfg, run):
    folder = Run(cfg).report()
    with stage(cfg, "report") as context:
        report.run(cfg, context)
    assert "explore/index.html" in (folder / "index.html").read_text(encoding="utf-8")
    assert "topic0" in (folder / "explore" / "index.html").read_text(encoding="utf-8")


def test_the_report_does_not_fail_where_the_tokenizer_is_gone(cfg, run):
    (Run(cfg).artifact("tokenizer", "key") / "model" / "weights.safetensors").unlink()
    folder = Run(cfg).report()
    with stage(cfg, "report") as context:
        report.run(cfg, context)
    assert not (folder / "explore").exists()
    assert "explore/index.html" not in (folder / "index.html").read_text(encoding="utf-8")


def test_the_report_does_not_fail_with_the_page(cfg, run, monkeypatch):
    monkeypatch.setattr(explore, "USERS", "no number")
    with stage(cfg, "report") as context:
        report.run(cfg, context)
    assert (Run(cfg).report() / "index.html").exists() and not (Run(cfg).report() / "explore").exists()
    assert "Error" in Run(cfg).error_log.read_text(encoding="utf-8")


@pytest.mark.parametrize("settings", [config.RandomSidSettings(), config.OpqSettings(width=12, codebook_size=8)])
def test_a_tokenizer_decodes_its_vectors_or_none(settings):
    data = shard(catalogue(60)[0], CONTENT)
    tokenizer = artifact.build(settings, data.widths)
    tokenizer.prepare(data, Workers())
    tokenizer.fit(data, Workers(), torch.Generator().manual_seed(0))
    rows = catalogue(60)[0].combine_chunks().to_batches()[0]
    codes = tokenizer.encode(data.take(np.arange(60))).codes.numpy()
    decoded = explore._decoded(tokenizer, rows, codes)
    assert (decoded is None) == isinstance(settings, config.RandomSidSettings)
