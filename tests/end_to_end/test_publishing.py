"""Test the checks between new tables and readers: missed steps, gates of a replacement, a hold, a dry run. Each test
works on a copy of one published shop."""

import json
from datetime import date

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from deltalake import DeltaTable

from adasid.config import load
from adasid.errors import GateError, InputError
from adasid.tables import LIVE
from adasid.tokenizers import artifact
from pipelines import report, sids
from pipelines.engines import tracking
from pipelines.features import items
from pipelines.nightly import retokenize, upkeep
from pipelines.publish import generations
from tests.end_to_end.nights import copied, next_day, noisy, put, rows_of
from tests.end_to_end.running import ITEMS

PUBLISHED = ("sids", "sid_changes", "generations", "live")


def stage(path, function, *overrides):
    """A stage in this process."""
    with tracking.stage(load(path, list(overrides)), function.__module__) as context:
        function(context.cfg, context)
    return context


def night(path, *overrides, dry=False):
    with tracking.stage(load(path, list(overrides)), "retokenize") as context:
        retokenize.run(context.cfg, context, date(2026, 1, 5), dry)
    return context


def roll(path, number, hold=False):
    return stage(path, lambda cfg, context: upkeep.rollback(cfg, context, number, hold))


def state(lake):
    return {name: lake.version(name) for name in PUBLISHED if lake.exists(name)}


def rewrite(lake, name, digest):
    table = lake.read(name)
    return lake.write(name, table.schema, table.to_batches(), digest, lake.lineage(name))


def test_a_step_that_was_left_out_is_named_with_what_lags(shop, tmp_path, capsys):
    path, lake = copied(shop, tmp_path / "shop")
    cfg, before = load(path), state(lake)
    assert night(path).status == "up to date"
    items.check_split(cfg, lake)
    rewrite(lake, "sequences", "tomorrow")  # as new events are, without new statistics
    context = night(path)
    assert (context.status, context.facts["lagging"]) == ("up to date", "behavior_embeddings")
    line = "behavior_embeddings version 0 lags behind sequences (read at version 0, now 1: 1 newer, since 20"
    assert line in capsys.readouterr().err
    line = r"embeddings could know events of today's test: .*sequences .*: run jobs/train.py --stage behavior, then"
    with pytest.raises(InputError, match=line):
        items.check_split(cfg, lake)
    items.check_split(load(path, ["behavior.refresh=keep"]), lake)
    rewrite(lake, "items", "tomorrow")
    rewrite(lake, "items", "the day after")
    line = r"^item_features version 0 lags behind items \(read at version 0, now 2: 2 newer, since 20.* UTC\); "
    line += r"item_stats version 0 lags behind items \(read .* UTC\): run jobs/build_features.py, then this job again$"
    for step in (night, lambda path: stage(path, sids.run)):
        with pytest.raises(InputError, match=line):
            step(path)
    assert state(lake) == before
    capsys.readouterr()
    stage(path, report.run)
    page = (cfg.run_dir / "report" / "index.html").read_text(encoding="utf-8")
    for said in (capsys.readouterr().err, page):
        for name in ("tem_stats", "tem_features", "ehavior_embeddings"):
            assert f"{name} version 0 lags behind" in said
    assert night(path, "pins={item_features: 0}").status == "up to date"  # on purpose
    assert "pinned by the config" in capsys.readouterr().err


def test_the_report_says_that_sids_lag_until_a_nightly_run_has_seen_the_items(shop, tmp_path):
    path, lake = copied(shop, tmp_path / "shop")
    assert not report.gather(load(path), lake).lags
    rewrite(lake, "item_features", "the same rows")
    (line,) = report.gather(load(path), lake).lags
    assert line.startswith("sids version 0 lags behind item_features (read at version 0, now 1")
    assert line.endswith(": run jobs/retokenize.py")
    assert night(path).status == "up to date"
    assert not report.gather(load(path), lake).lags


def test_a_replacement_is_gated_as_a_nightly_run_is_unless_it_is_on_purpose(shop, tmp_path):
    path, lake = copied(shop, tmp_path / "shop")
    model, before = generations.live(lake).artifact, state(lake)
    put(lake, lake.read("item_features").slice(0, ITEMS // 2), "half of it")
    line = rf"removed is 0\.5 of {ITEMS} live items, allowed 0\.1\. Generation 1 stays live; .* sids\.replace=true$"
    with pytest.raises(GateError, match=line):
        stage(path, sids.run, f"sids.artifact={model}")
    other = load(path, ["tokenizer={name: random, codebook_size: 16, levels: 3}"]).tokenizer
    artifact.write(tmp_path / "random", artifact.build(other, {}), other, {})
    chosen = f"sids.artifact={tmp_path / 'random'}", "retokenize.gates.max_removed=1.0"
    line = rf": churn is 1 of {ITEMS // 2} items of both generations, allowed 0\.1; churn, weighted by events is 1 of "
    with pytest.raises(GateError, match=line):
        stage(path, sids.run, *chosen)
    assert state(lake) == before
    context = stage(path, sids.run, *chosen, "sids.replace=true")
    row = generations.live(lake)
    assert (row.generation, row.items, lake.read("sid_changes").num_rows) == (2, ITEMS // 2, ITEMS)
    assert (context.facts["removed"], context.facts["churn"]) == (ITEMS // 2, "100.00%")
    overruled = [gate.gate for gate in row.gates if gate.overruled == "sids.replace"]
    assert overruled == ["churn", "churn, weighted by events"]
    assert stage(path, sids.run, *chosen).status == "up to date"
    stage(path, report.run)
    page = (load(path).run_dir / "report" / "index.html").read_text(encoding="utf-8")
    assert "gate churn was overruled by sids.replace, 1" in page


def test_a_hold_lasts_until_its_release(shop, tmp_path):
    path, lake = copied(shop, tmp_path / "shop")
    model, old = generations.live(lake).artifact, pa.schema([field for field in LIVE if field.name != "hold"])
    lake.write("live", old, lake.read("live").select(old.names).cast(old).to_batches(), "before there were holds")
    assert generations.on_hold(lake) is None
    assert roll(path, 1).status == "up to date"
    assert roll(path, 1, hold=True).facts["on hold"].startswith("since 20")
    assert roll(path, 1).status == "up to date" and generations.on_hold(lake)
    DeltaTable(lake.path("live")).alter.set_table_properties({"delta.enableExpiredLogCleanup": "false"})
    before = state(lake)
    put(lake, next_day(lake.read("item_features"), seed=1), "tomorrow")
    line = r"^generation 1 is on hold since 20.* UTC: nothing is published until `.*rollback.py .*--release`$"
    chosen = f"sids.artifact={model}", "sids.replace=true"
    live = load(path).run_dir / "exports" / "live.json"
    for step in (night, lambda path: stage(path, sids.run, *chosen)):
        live.write_text('{"generation": 9}')  # as a roll-back leaves it that was killed in between
        with pytest.raises(GateError, match=line):
            step(path)
        assert json.loads(live.read_text())["generation"] == 1
    with pytest.raises(GateError, match="not published: largest group is"):  # checks come first
        night(path, "sids.gates.max_group=1")
    assert state(lake) == before
    night(path, dry=True)
    for page in ("nights/index.html", "index.html"):
        stage(path, report.run)
        assert "Generation 1 is on hold since 20" in (load(path).run_dir / "report" / page).read_text(encoding="utf-8")
    assert roll(path, None).facts["on hold"] == "no" and roll(path, None).status == "up to date"
    assert night(path).facts["generation"] == 2


def test_a_recorded_generation_does_not_go_live_over_another_than_it_was_measured_against(shop, tmp_path, monkeypatch):
    path, lake = copied(shop, tmp_path / "shop")
    chosen = f"sids.artifact={generations.live(lake).artifact}", "sids.replace=true"
    put(lake, next_day(lake.read("item_features"), seed=1), "tomorrow")
    assert night(path).facts["generation"] == 2
    rewrite(lake, "item_features", "tomorrow")  # as maintenance leaves it: a new version of the same rows
    assert night(path, "retokenize.policy=refit").status == "up to date"
    put(lake, next_day(lake.read("item_features"), seed=2), "the day after")

    def killed(*args):
        raise KeyboardInterrupt

    point = generations._point
    monkeypatch.setattr(generations, "_point", killed)
    with pytest.raises(KeyboardInterrupt):
        stage(path, sids.run, *chosen)
    monkeypatch.setattr(generations, "_point", point)
    assert generations.history(lake)[-1].generation == 3
    roll(path, 1)
    stage(path, sids.run, *chosen)
    row, first = generations.live(lake), generations.history(lake)[0]
    assert (row.generation, row.parent) == (4, 1)
    old, new = (rows_of(lake.read("sids", version)) for version in (first.sids_version, row.sids_version))
    assert {item["generation"] for item in new.values()} == {4}
    moves = lake.read("sid_changes").filter(pc.field("generation") == 4).to_pylist()
    assert moves and all(move["old_codes"] == old.get(move["item_id"], {}).get("codes") for move in moves)
    stay = [item for item in old if item in new and old[item]["codes"] == new[item]["codes"]]
    assert len(stay) > ITEMS / 2 and any(old[item]["collision_rank"] for item in stay)
    assert all(old[item]["collision_rank"] == new[item]["collision_rank"] for item in stay)


def test_pins_of_the_pointer_are_refused_by_jobs_that_publish(shop, tmp_path):
    path, _ = copied(shop, tmp_path / "shop")
    pins, line = "pins={live: 0}", r"pins\.live is 0, but jobs that publish or maintain follow its newest"
    for step in (
        lambda: night(path, pins),
        lambda: stage(path, sids.run, pins),
        lambda: stage(path, upkeep.maintain, pins),
    ):
        with pytest.raises(InputError, match=line):
            step()


def test_a_dry_run_measures_and_judges_but_publishes_nothing(shop, tmp_path, capsys):
    path, lake = copied(shop, tmp_path / "shop")
    cfg, before = load(path), state(lake)
    put(lake, next_day(lake.read("item_features"), seed=1), "tomorrow")
    context = night(path, dry=True)
    assert context.status == "dry run"
    assert (context.facts["new"], context.facts["removed"], context.facts["policy"]) == (12, 6, "frozen")
    said = capsys.readouterr().err
    for line in (f"passed: removed is 0.01 of {ITEMS} live items, allowed 0.1\n", "passed: largest group is "):
        assert line in said
    page = cfg.run_dir / "report" / "nights" / "index.html"
    line = "Dry run of 2026-01-05, policy frozen: nothing was published; all gates passed."
    assert line in page.read_text(encoding="utf-8")
    put(lake, noisy(lake.read("item_features"), 5, 0.5), "all changed")
    with pytest.raises(
        GateError, match=r"^dry run: nightly run of 2026-01-05 not published: .*Generation 1 stays live"
    ):
        night(path, "retokenize.gates.max_churn=0.01", dry=True)
    assert "FAILED: churn is 0." in capsys.readouterr().err
    assert "gates would refuse it: churn is" in page.read_text(encoding="utf-8")
    assert state(lake) == before
    assert not (cfg.run_dir / "refused.json").exists() and not (cfg.run_dir / "exports" / "2").exists()
    put(lake, next_day(lake.read("item_features", 0), seed=1), "tomorrow, again")
    assert night(path).facts["generation"] == 2 and "Dry run" not in page.read_text(encoding="utf-8")
    assert set(rows_of(lake.read("sids"))) == set(rows_of(lake.read("item_features")))
