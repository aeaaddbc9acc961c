"""Test the nightly job on real Delta tables: which SIDs change, which stay, what is refused, and how to roll back."""

import json
from collections import Counter
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file

from adasid.config import load
from adasid.errors import GateError, InputError
from adasid.recommenders.tokens import ItemTokens, Prefixes
from adasid.sid import Slot
from adasid.tables import SIDS
from adasid.tokenizers import artifact
from pipelines.engines import tracking
from pipelines.nightly import retokenize, upkeep
from pipelines.publish import exports, generations
from pipelines.run import Run
from tests.end_to_end.nights import by_item, copied, follow, merge, next_day, noisy, put, rows_of, without

OPEN = {
    "gates": {"max_churn": 1.0, "max_weighted_churn": 1.0, "max_tail_collision": 1.0, "max_error_ratio": 100.0},
    "warm": {"epochs": 3},
}


@pytest.fixture(scope="module")
def published(tmp_path_factory, shop):
    """A first generation; each test adds its nights."""
    return copied(shop, tmp_path_factory.mktemp("nights") / "shop", retokenize=OPEN)


def night(path, day, *overrides):
    """A night in this process."""
    cfg = load(path, list(overrides))
    with tracking.stage(cfg, "retokenize", journal=False) as context:
        retokenize.run(cfg, context, date.fromisoformat(day))
    return context


def test_a_day_without_changes_publishes_nothing(published):
    path, lake = published
    before = lake.versions("sids", "generations", "live")
    assert night(path, "2026-01-01").status == "up to date"
    table = lake.read("item_features")
    put(lake, table, "same rows, another version")
    assert night(path, "2026-01-01").status == "up to date"
    assert lake.versions("sids", "generations", "live") == before


@pytest.mark.parametrize("feed", [False, True])
def test_new_changed_and_removed_items_alone_are_touched(published, spark, feed):
    path, lake = published
    old, features = by_item(lake, generations.live(lake).sids_version), lake.read("item_features")
    day = 3 if feed else 2
    today = next_day(features, seed=day)
    if feed:
        follow(spark, lake)
        night(path, f"2026-01-0{day}")
        merge(spark, lake, today)
    else:
        put(lake, today, "next day")
    context = night(path, f"2026-01-0{day}")
    row = generations.live(lake)
    assert context.facts["detected by"] == ("change feed" if feed else "fingerprints")
    assert max(row.drift["norms"].values()) < 0.1
    new = by_item(lake, row.sids_version)
    assert row.run_date == f"2026-01-0{day}" and row.policy == "frozen" and row.parent == row.generation - 1
    before, after = rows_of(old), rows_of(new)
    prints = {r["item_id"]: r["fingerprint"] for r in today.select(["item_id", "fingerprint"]).to_pylist()}
    assert set(after) == set(prints)
    touched = {
        item
        for item in set(before) | set(after)
        if item not in before or item not in after or before[item]["fingerprint"] != prints[item]
    }
    assert 0 < len(touched) < 60
    for item in set(after) - touched:
        assert after[item] == before[item], item
    for item in {item for item in set(before) & set(after) if before[item]["codes"] == after[item]["codes"]}:
        assert after[item]["collision_rank"] == before[item]["collision_rank"], item
    for item in touched & set(after):
        assert after[item]["generation"] == row.generation and after[item]["fingerprint"] == prints[item]
    changes = {r["item_id"]: r for r in lake.read("sid_changes").to_pylist() if r["generation"] == row.generation}
    for item in touched:
        codes = [side[item]["codes"] if item in side else None for side in (before, after)]
        if codes[0] != codes[1]:
            assert [changes[item]["old_codes"], changes[item]["new_codes"]] == codes
            assert changes[item]["why"] == ("new" if codes[0] is None else "removed" if codes[1] is None else "changed")
    assert set(changes) <= touched
    churn = row.churn
    both = [item for item in before if item in after]
    moved = [item for item in both if before[item]["codes"] != after[item]["codes"]]
    assert churn["churn"] == pytest.approx(len(moved) / len(both)) and churn["changed"] == len(moved)
    assert (churn["new"], churn["removed"]) == (len(set(after) - set(before)), len(set(before) - set(after)))
    for slot, name in enumerate(row.metrics["slots"]):
        assert churn["by_slot"][name] == pytest.approx(
            sum(before[i]["codes"][slot] != after[i]["codes"][slot] for i in both) / len(both)
        )
    for group in {tuple(r["codes"]) for r in after.values()}:
        ranks = [r["collision_rank"] for r in after.values() if tuple(r["codes"]) == group]
        assert len(ranks) == len(set(ranks))
    assert context.facts["generation"] == row.generation
    run = context.client.get_run(context.run_id)
    assert (
        run.data.metrics["cold"] == pytest.approx(row.drift["cold"])
        and run.data.metrics["churn_tail"] == churn["by_stratum"]["tail"]
    )
    assert run.data.metrics["largest_tail_group"] == row.metrics["largest_tail_group"] <= row.metrics["largest_group"]
    assert json.loads(Path(context.client.download_artifacts(context.run_id, "gates.json")).read_text())["gates"] == [
        gate.model_dump() for gate in row.gates
    ]
    assert night(path, f"2026-01-0{day}").status == "up to date"
    check_exports(path, lake, row, after)
    assert pointed(path) == row.generation


@pytest.mark.parametrize("how", ["change feed", "fingerprints"])
def test_a_small_nightly_run_without_spark_publishes_what_spark_would(shop, tmp_path, spark, how):
    """Two changes, one of them of counts and strata of items that keep their vectors; an item that comes and goes
    between two nights."""
    small, whole = (copied(shop, tmp_path / name / "shop", retokenize=OPEN) for name in ("small", "whole"))
    for _, lake in (small, whole):
        if how == "change feed":
            follow(spark, lake)
        features = lake.read("item_features")
        step = next_day(features, seed=5, noise=1.5)
        merge(spark, lake, step) if how == "change feed" else put(lake, step, "step")
        kinds = step["stratum"].to_pylist()
        places = {
            "interactions": pa.array(range(step.num_rows)),
            "stratum": pa.array(["tail" if i % 5 == 0 else kind for i, kind in enumerate(kinds)]),
        }
        for name, column in places.items():
            place = step.column_names.index(name)
            step = step.set_column(place, step.schema.field(name), column)
        gone = without(next_day(step, seed=6, noise=1.5), ["new5-00000"])
        if how == "change feed":
            merge(
                spark,
                lake,
                gone,
                "(t.interactions <> s.interactions OR t.stratum <> s.stratum OR t.fingerprint <> s.fingerprint)",
            )
        else:
            put(lake, gone, "gone")
    notes = [
        night(path, "2026-01-05", f"retokenize.small_night={limit}") for (path, _), limit in ((small, 1000), (whole, 0))
    ]
    ours, theirs = (generations.live(lake) for _, lake in (small, whole))
    assert ours.generation == theirs.generation == 2
    assert notes[0].facts["detected by"] == notes[1].facts["detected by"] == how
    assert [lake.open("sids").history(1)[0]["operation"] for _, lake in (small, whole)] == ["MERGE", "WRITE"]
    for name in ("metrics", "churn", "gates", "items"):
        values = [json.loads(json.dumps(live.model_dump()[name])) for live in (ours, theirs)]
        assert flat(values[0]) == pytest.approx(flat(values[1]), rel=1e-6, abs=1e-9), name
    assert min(ours.churn[name] for name in ("new", "changed", "removed")) > 0
    for name in ("norms", "error_ratio", "usage", "cold", "counts"):
        assert flat(ours.drift[name]) == pytest.approx(flat(theirs.drift[name]), rel=1e-5), name
    tables = [by_item(lake) for _, lake in (small, whole)]
    weights = [np.array(table["weights"].to_pylist()) for table in tables]
    assert np.allclose(*weights, atol=1e-6)
    assert tables[0].drop_columns(["weights"]).equals(tables[1].drop_columns(["weights"]))
    moves = [rows_of(lake.read("sid_changes")) for _, lake in (small, whole)]
    assert moves[0] == moves[1] and len(moves[0]) > 10
    before = rows_of(by_item(small[1], 0))
    for item, row in rows_of(tables[0]).items():
        if row["generation"] == 1:
            assert row == before[item]
    path, lake = small
    spark.sql(f"DELETE FROM delta.`{lake.path('item_features')}` WHERE item_index IN (2, 9)")
    assert night(path, "2026-01-06", "retokenize.exports=[changes]").facts["removed"] == 2
    left = load(path).run_dir / "exports" / "3"
    assert {file.name for file in left.iterdir()} == {"changes", "manifest.json"}
    assert pq.read_table(left / "changes")["why"].to_pylist() == ["removed", "removed"]
    third = generations.live(lake)
    assert third.items == ours.items - 2 == lake.read("sids").num_rows and third.generation == 3
    sizes = Counter(Counter(map(tuple, lake.read("sids")["codes"].to_pylist())).values())
    assert third.metrics["group_sizes"] == [[size, sizes[size]] for size in sorted(sizes)]
    # what it cannot judge, it leaves to Spark
    spark.sql(
        f"UPDATE delta.`{lake.path('item_features')}` SET text = transform(text, x -> double('NaN')), fingerprint = "
        "'n' WHERE item_index = 3"
    )
    with pytest.raises(GateError, match="items with vectors that are not finite is 1, allowed 0"):
        night(path, "2026-01-07")
    assert generations.live(lake).generation == 3


def flat(value, name=""):
    """Numbers of nested JSON data, by their place; text as the place alone."""
    if isinstance(value, dict):
        return {place: number for key, part in value.items() for place, number in flat(part, f"{name}.{key}").items()}
    if isinstance(value, list):
        return {
            place: number for key, part in enumerate(value) for place, number in flat(part, f"{name}.{key}").items()
        }
    return {f"{name}={value}": 0} if isinstance(value, str) else {name: value}


def check_exports(path, lake, row, sids):
    folder = load(path).run_dir / "exports" / str(row.generation)
    table = pq.read_table(folder / "sids").to_pylist()
    assert {r["item_id"]: r["codes"] for r in table} == {item: r["codes"] for item, r in sids.items()}
    codes = np.load(folder / "codes.npy")
    ids = (folder / "item_ids.txt").read_text().split()
    assert [sids[item]["codes"] for item in ids] == codes.tolist() and len(ids) == len(sids)
    assert json.loads((folder / "index.json").read_text()) == {
        str(place): sids[item]["tokens"] for place, item in enumerate(ids)
    }
    groups = {tuple(r["codes"]): r["items"] for r in pq.read_table(folder / "items").to_pylist()}
    assert sum(map(len, groups.values())) == len(sids)
    assert all(
        [sids[item]["collision_rank"] for item in items] == sorted(sids[item]["collision_rank"] for item in items)
        for items in groups.values()
    )
    slots = [Slot(**slot) for slot in json.loads((folder / "manifest.json").read_text())["slots"]]
    ours, stored = Prefixes.of(ItemTokens.of(codes, slots)), load_file(folder / "prefixes.safetensors")
    assert (
        all((stored[f"token.{level}"] == tokens).all() for level, tokens in enumerate(ours.token))
        and (stored["items"] == ours.items).all()
    )
    moves = pq.read_table(folder / "changes").to_pylist()
    assert len(moves) == sum(r["generation"] == row.generation for r in lake.read("sid_changes").to_pylist())


def pointed(path):
    """The generation that ``live.json`` names, whose folder it names too where it is there."""
    folder = load(path).run_dir / "exports"
    facts = json.loads((folder / "live.json").read_text())
    assert facts["folder"] == (str(facts["generation"]) if (folder / str(facts["generation"])).exists() else None)
    return facts["generation"]


def test_a_date_before_the_last_one_is_refused(published):
    path, lake = published
    with pytest.raises(
        InputError, match=r"run date 2025-12-31 is before 2026-01-0\d, which generation \d was published for"
    ):
        night(path, "2025-12-31")


def test_a_failed_gate_keeps_yesterday_live(published):
    path, lake = published
    before = generations.live(lake), lake.versions("sids", "generations", "live")
    put(lake, noisy(lake.read("item_features"), 5, 0.5), "all changed")
    line = (
        r"nightly run of 2026-01-04 not published: churn is 0\.\d+ of \d+ items of both generations, "
        r"allowed 0\.1\. Generation 3"
    )
    with pytest.raises(GateError, match=line):
        night(path, "2026-01-04", "retokenize.gates.max_churn=0.1")
    assert (generations.live(lake), lake.versions("sids", "generations", "live")) == before
    refused = json.loads((load(path).run_dir / "refused.json").read_text())
    assert [gate["gate"] for gate in refused["gates"] if not gate["passed"]] == ["churn"]
    assert len(refused["worst"]["most moved, by events"]) == 10
    context = night(path, "2026-01-04")  # the same day, gates as in the file
    assert context.facts["churn"] != "0.00%"


@pytest.mark.parametrize("policy", ["frozen", "warm", "refit"])
def test_small_moves_of_vectors_move_few_sids(shop, tmp_path, policy):
    path, lake = copied(shop, tmp_path / "shop", retokenize=OPEN)
    live = generations.live(lake)
    old = rows_of(by_item(lake, live.sids_version))
    put(lake, noisy(lake.read("item_features"), 7, 0.02), policy)
    night(path, "2026-01-04", f"retokenize.policy={policy}")
    row = generations.live(lake)
    assert row.policy == policy and (row.tokenizer != live.tokenizer) == (policy != "frozen")
    new = rows_of(by_item(lake, row.sids_version))
    kept = np.mean([[a == b for a, b in zip(old[item]["codes"], new[item]["codes"])] for item in old])
    same = [item for item in old if old[item]["codes"] == new[item]["codes"]]
    assert [new[item]["collision_rank"] for item in same] == [old[item]["collision_rank"] for item in same]
    assert sum(old[item]["collision_rank"] > 0 for item in same) > 3
    assert len({(*row["codes"], row["collision_rank"]) for row in new.values()}) == len(new)
    assert kept > {"frozen": 0.99, "warm": 0.95, "refit": 0.85}[policy]
    _, manifest = artifact.read(load(path).run_dir / row.artifact)
    assert manifest.relabelled == (policy == "refit")
    assert champion(path) == row.tokenizer
    assert night(path, "2026-01-04", f"retokenize.policy={policy}").status == "up to date"


def champion(path):
    """Digest of the tokenizer that the registry calls the champion."""
    cfg = load(path)
    client = MlflowClient(Run(cfg).tracking_uri)
    return client.get_model_version_by_alias(cfg.tracking.model or f"adasid-{cfg.name}", "champion").tags["digest"]


def test_auto_follows_the_drift_and_stays_frozen_where_gates_refuse_the_other_policy(shop, tmp_path):
    path, lake = copied(shop, tmp_path / "shop", retokenize=OPEN)
    first = generations.live(lake).tokenizer
    put(lake, noisy(lake.read("item_features"), 7, 0.02), "moved")
    auto = "retokenize.policy=auto", "retokenize.auto.refit_error=50", "retokenize.small_night=0"
    moved = "retokenize.auto.warm_norms=1.0e-9"
    night(path, "2026-01-04", *auto, moved, "retokenize.warm.lr=0.1", "retokenize.gates.max_error_ratio=1.05")
    row = generations.live(lake)
    assert (row.generation, row.policy, row.drift["asked"], row.tokenizer) == (2, "frozen", "warm", first)
    html = (load(path).run_dir / "report" / "nights" / "index.html").read_text(encoding="utf-8")
    assert "Generation 2 is frozen though its drift asked for warm" in html and champion(path) == first
    put(lake, noisy(lake.read("item_features"), 9, 0.02), "moved again")
    night(path, "2026-01-06", *auto, moved)
    row = generations.live(lake)
    assert (row.generation, row.policy) == (3, "warm") and "asked" not in row.drift
    assert champion(path) == row.tokenizer != first


def test_rollback_and_maintenance(published, monkeypatch):
    path, lake = published
    cfg = load(path)
    rows = generations.history(lake)
    with tracking.stage(cfg, "rollback", journal=False) as context:
        upkeep.rollback(cfg, context, 1)
    assert generations.live(lake).generation == pointed(path) == 1
    assert night(path, rows[-1].run_date).status == "done"  # from the first generation on
    last = generations.live(lake)
    assert pointed(path) == last.generation
    with tracking.stage(cfg, "rollback", journal=False) as context:
        upkeep.rollback(cfg, context, 1)
    again = night(path, last.run_date)  # the same night does not undo the roll-back
    assert again.status == "up to date" and generations.live(lake).generation == pointed(path) == 1
    assert generations.history(lake)[-1].generation == last.generation
    assert champion(path) == generations.live(lake).tokenizer
    with (
        monkeypatch.context() as cut,
        pytest.raises(InputError, match="no space"),
    ):  # a later night is cut off before it is live, and run again
        put(lake, next_day(lake.read("item_features"), seed=77), "after the roll-back")
        cut.setattr(exports, "write", lambda *_, **__: (_ for _ in ()).throw(OSError("no space")))
        night(path, last.run_date)
    assert generations.live(lake).generation == 1 and generations.history(lake)[-1].generation == last.generation + 1
    assert pointed(path) == 1
    assert night(path, last.run_date).status == "done"
    assert generations.live(lake).generation == pointed(path) == last.generation + 1
    (load(path).run_dir / "exports" / "live.json").unlink()  # a kill may have come before it was written
    assert night(path, last.run_date).status == "up to date" and pointed(path) == last.generation + 1
    with (
        pytest.raises(InputError, match=r"generation 99 does not exist \(existing: 1 to \d+\)"),
        tracking.stage(cfg, "rollback", journal=False) as context,
    ):
        upkeep.rollback(cfg, context, 99)
    for days in (30, 0):  # first, all that was tracked stays
        assert not lake.missing("sids", rows[1].sids_version)
        cfg = load(path, ["retokenize.keep=2", "retokenize.grace_hours=0", f"retokenize.lineage_days={days}"])
        with tracking.stage(cfg, "maintain", journal=False) as context:
            upkeep.maintain(cfg, context)
    last = generations.history(lake)
    for row in last[-2:]:
        assert lake.read("sids", row.sids_version).num_rows == row.items
    with (
        pytest.raises(InputError, match="cannot be read any more"),
        tracking.stage(cfg, "rollback", journal=False) as context,
    ):
        upkeep.rollback(cfg, context, last[1].generation)
    assert lake.read("sids").schema.names == SIDS.names and isinstance(lake.read("live"), pa.Table)
