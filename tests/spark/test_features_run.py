"""Run the whole features stage on a small catalogue: against plain Python, twice, in another row order; count its
shuffles."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter, defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from adasid import tables
from adasid.config import build, digest
from adasid.errors import InputError
from pipelines import features, stage
from pipelines.engines import tracking
from pipelines.engines.lake import Lake
from pipelines.engines.spark import struct, write
from pipelines.features import check, events, histories, items, layout, statistics
from pipelines.features.layout import USER
from pipelines.training import behavior
from tests.conftest import give_store

MODALITIES = ("text", "visual")
COLD = ("i98", "i99")


def catalogue():
    """(items, interactions): 30 items of which two are cold, 25 users, and a few bad rows."""
    rng = np.random.default_rng(5)
    names = [f"i{i:02d}" for i in range(28)]
    vectors = rng.normal(size=(30, 7)).round(3)
    rows = [
        (name, f"title {name}", vectors[i, :4].tolist(), None if i % 9 == 0 else vectors[i, 4:].tolist())
        for i, name in enumerate([*names, *COLD])
    ]
    rows += [("", "no id", [1.0] * 4, None), rows[3]]
    seen = []
    for user in range(25):
        for step in range(int(rng.integers(1, 9))):
            item, time = (
                names[min(int(rng.zipf(1.4)) - 1, 27)],
                1_500_000_000 + int(rng.integers(0, 40)) * 86_400 + step,
            )
            text = (str(time), str(time * 1000), np.datetime64(time, "s").astype(str))[step % 3]
            seen.append((f"u{user:02d}", item, text, None, [None, 2.0, 5.0][step % 3], None))
    return rows, [*seen, *seen[:5], ("u00", "nowhere", "1", None, None, None)]


def config(root, **sections):
    give_store(root / "t")
    return build(
        {
            "name": "t",
            "runs_dir": str(root),
            "spark": {"master": "local[2]", "shuffle_partitions": 2},
            "features": {"max_rejected": 0.2, "ranking_split": "same", "user_buckets": 3},
            **sections,
        }
    )


def prepare(spark, cfg, rows, seen, order=None):
    """Write both tables, ``order`` reversing and spreading the rows."""
    schema = tables.items((*MODALITIES, *(["behavior"] if len(rows[0]) == 5 else [])))
    with tracking.stage(cfg, "ingest") as context:
        for table, data, arrow in (("items", rows, schema), ("interactions", seen, tables.INTERACTIONS)):
            frame = spark.createDataFrame(data[::-1] if order else data, struct(arrow))
            write(frame.repartition(order) if order else frame.coalesce(1), context.lake, table, arrow, "ingest")
    return context.lake


def embed(lake, drop=0):
    """Behaviour embeddings as the training stage writes them; the norm grows with the count, apart from noise that only
    depends on the id."""
    stats = lake.read("item_stats").to_pylist()[drop:]
    noise = {row["item_id"]: int(hashlib.sha256(row["item_id"].encode()).hexdigest()[:4], 16) / 2**16 for row in stats}
    rows = [
        {
            "item_id": r["item_id"],
            "item_index": r["item_index"],
            "behavior": [noise[r["item_id"]], 1.0],
            "norm": r["interactions"] ** 0.5 + noise[r["item_id"]],
        }
        for r in stats
    ]
    lake.write(
        "behavior_embeddings",
        tables.BEHAVIOR_EMBEDDINGS,
        pa.Table.from_pylist(rows, tables.BEHAVIOR_EMBEDDINGS).to_batches(),
        f"e{drop}",
    )


def run(cfg, part="auto"):
    with tracking.stage(cfg, "features") as context:
        features.run(cfg, context, part)
    return context


def content(lake, *names):
    """Table contents without regard to the order of rows, and without the run's digest."""
    plain = {
        name: [{k: v for k, v in row.items() if k != "input_hash"} for row in lake.read(name).to_pylist()]
        for name in names
    }
    return {name: sorted(rows, key=str) for name, rows in plain.items()}


@pytest.fixture(scope="module")
def done(spark, tmp_path_factory):
    """(config, lake, the tracks of three runs): the events part, then with embeddings, then once more."""
    cfg = config(tmp_path_factory.mktemp("features"))
    lake = prepare(spark, cfg, *catalogue())
    first = run(cfg)
    embed(lake)
    return cfg, lake, (first, run(cfg), run(cfg))


def expected_events():
    """Clean events by user in order, in plain Python."""
    users = defaultdict(list)
    for user, item, text, _, rating, _ in dict.fromkeys(row for row in catalogue()[1] if row[1] != "nowhere"):
        time = (
            int(np.datetime64(text).astype("datetime64[s]").astype(int))
            if "T" in text
            else int(text) // (1000 if len(text) > 10 else 1)
        )
        users[user].append((time, item, -1.0 if rating is None else rating))
    for user, rows in users.items():
        first = {(time, item): (time, item, rating) for time, item, rating in sorted(rows, reverse=True)}
        users[user] = sorted(first.values())
    return users


def test_tables_against_plain_python(done):
    _, lake, _ = done
    users = expected_events()
    training = {user: rows[: len(rows) - 2 if len(rows) >= 3 else len(rows)] for user, rows in users.items()}
    counts = {row[0]: 0 for row in catalogue()[0] if row[0]} | Counter(
        item for rows in training.values() for _, item, _ in rows
    )
    index = {item: i for i, item in enumerate(sorted(counts, key=lambda item: (-counts[item], item)))}
    assert {
        row["item_id"]: (row["item_index"], row["interactions"]) for row in lake.read("item_stats").to_pylist()
    } == {item: (index[item], counts[item]) for item in counts}
    assert {row["user_id"]: row["interactions"] for row in lake.read("user_stats").to_pylist()} == {
        user: len(rows) for user, rows in training.items()
    }
    samples = {
        (row["user_id"], row["position"]): (row["item_index"], int(row["time"].timestamp()), row["label"])
        for row in lake.read("ranking_samples").to_pylist()
    }
    assert samples == {
        (user, i): (index[item], time, {-1.0: None, 2.0: 0, 5.0: 1}[rating])
        for user, rows in users.items()
        for i, (time, item, rating) in enumerate(rows)
    }
    sequences = {
        (row["user_id"], row["split"]): (row["history"], row["target"]) for row in lake.read("sequences").to_pylist()
    }
    indexed = {user: [index[item] for _, item, _ in rows] for user, rows in users.items()}
    assert sequences == {
        **{(user, "train"): (indexed[user][: len(rows)], None) for user, rows in training.items() if len(rows) >= 2},
        **{(user, "validation"): (row[:-2], row[-2]) for user, row in indexed.items() if len(row) >= 3},
        **{(user, "test"): (row[:-1], row[-1]) for user, row in indexed.items() if len(row) >= 3},
    }
    stats = lake.read("catalog_stats").to_pylist()[0]
    assert dict(stats["rejected"]) == {"empty_item_id": 1, "unknown_item": 1} and stats["duplicate_items"] == 1
    assert dict(stats["missing"]) == {
        "text": 0,
        "visual": sum(row[3] is None for row in catalogue()[0] if row[0]) - (catalogue()[0][3][3] is None),
    }
    assert [stats[name] for name in ("capped", "below_k_core", "tied", "outside_histories")] == [0] * 4
    assert stats["duplicates"] == len(catalogue()[1]) - 1 - stats["interactions"]


def in_order(rows):
    order = [(row["user_index"], row.get("position", 0)) for row in rows]
    return order == sorted(order)


def test_a_user_is_in_one_bucket_and_files_are_in_order(spark, done):
    cfg, lake, _ = done
    samples = pa.Table.from_batches(lake.batches("ranking_samples")).to_pylist()
    users = sorted({row["user_id"] for row in samples})
    assert {row["user_id"]: row["user_index"] for row in samples} == {user: i for i, user in enumerate(users)}
    frame = spark.createDataFrame([(user,) for user in users], "user_id string")
    of_user = frame.selectExpr("user_id", f"pmod(xxhash64(user_id), {cfg.features.user_buckets}) AS bucket").collect()
    buckets = {row["user_id"]: row["bucket"] for row in of_user}
    assert len(set(buckets.values())) == 3
    for name in ("ranking_samples", "sequences"):
        rows = lake.read(name).to_pylist()
        assert all(buckets[row["user_id"]] == row["bucket"] for row in rows)
        assert lake.open(name).metadata().partition_columns == ["bucket"]
        files = [pq.ParquetFile(file).read().to_pylist() for file in lake.open(name).file_uris()]
        assert len(files) == 3
        assert all(in_order(file) and len({row["user_id"] for row in file}) > 1 for file in files)
    stats = lake.read("user_stats").to_pylist()
    assert all(users[row["user_index"]] == row["user_id"] for row in stats)


def test_tables_without_buckets_are_refused_with_the_fix(lake):
    old = pa.table({"user_id": ["u"], "split": ["test"]})
    lake.write("sequences", old.schema, old.to_batches(), "old")
    with pytest.raises(InputError, match=r"no columns 'bucket' and 'user_index'.* run jobs/build_features"):
        layout.check(lake, "sequences")
    with pytest.raises(InputError, match=r"no columns 'bucket' and 'user_index'"):
        behavior.BEHAVIOR.body(stage.Inputs(build({"name": "t"}), {}, {}, {}, "h", lake), None)


def test_rated_events_are_split_by_time_and_nothing_learns_from_what_a_task_holds_out(spark, tmp_path):
    cfg = config(tmp_path, features={"max_rejected": 0.2, "ranking_split": "auto"})
    lake = prepare(spark, cfg, *catalogue())
    assert [run(cfg, "events").status for _ in range(2)] == ["done", "up to date"]
    users = expected_events()
    times = sorted(time for rows in users.values() for time, *_ in rows)
    validation, test = (times[-round(share * len(times))] for share in (0.15, 0.1))
    held_out = {user: len(rows) - 2 if len(rows) >= 3 else len(rows) for user, rows in users.items()}

    def split(user, place, time):
        early = "train" if place < held_out[user] else "ranking"
        return "test" if time >= test else "validation" if time >= validation else early

    samples = {(row["user_id"], row["position"]): row["split"] for row in lake.read("ranking_samples").to_pylist()}
    assert samples == {
        (user, i): split(user, i, time) for user, rows in users.items() for i, (time, *_) in enumerate(rows)
    }
    assert set(samples.values()) == {"train", "ranking", "validation", "test"}
    training = {
        user: [item for i, (time, item, _) in enumerate(rows) if split(user, i, time) == "train"]
        for user, rows in users.items()
    }
    stats = {row["item_id"]: row for row in lake.read("item_stats").to_pylist()}
    counts = Counter(item for rows in training.values() for item in rows)
    assert {item: row["interactions"] for item, row in stats.items() if row["interactions"]} == counts
    assert {row["user_id"]: row["interactions"] for row in lake.read("user_stats").to_pylist()} == {
        u: len(rows) for u, rows in training.items() if rows
    }
    indexed = {user: [stats[item]["item_index"] for _, item, _ in rows] for user, rows in users.items()}
    sequences = {
        (row["user_id"], row["split"]): (row["history"], row["target"]) for row in lake.read("sequences").to_pylist()
    }
    assert sequences == {
        **{(user, "train"): (indexed[user][: len(rows)], None) for user, rows in training.items() if len(rows) >= 2},
        **{(user, "validation"): (row[:-2], row[-2]) for user, row in indexed.items() if len(row) >= 3},
        **{(user, "test"): (row[:-1], row[-1]) for user, row in indexed.items() if len(row) >= 3},
    }
    assert lake.read("catalog_stats").to_pylist()[0]["ranking_split"] == "global_time"
    assert run(config(tmp_path), "events").status == "done", "another split is another table"
    assert lake.read("catalog_stats").to_pylist()[0]["ranking_split"] == "leave_one_out"


def test_every_item_has_a_row_of_features_also_the_cold(done):
    _, lake, (first, second, _) = done
    rows = {row["item_id"]: row for row in lake.read("item_features").to_pylist()}
    given = {row[0]: row for row in catalogue()[0] if row[0]}
    assert rows.keys() == given.keys()
    for item, row in rows.items():
        assert row["text"] == pytest.approx(given[item][2])
        assert (row["visual"] is None) == (given[item][3] is None)
        assert 0 <= row["richness"] <= 1
        assert (
            (row["behavior"] is None)
            == (row["norm"] is None)
            == (row["interactions"] == 0)
            == (row["stratum"] == "cold")
        )
    assert all(rows[item]["stratum"] == "cold" and rows[item]["richness"] == 0 for item in COLD)
    assert len({row["fingerprint"] for row in rows.values()}) == len(rows)
    files = [pq.read_table(file)["item_index"].to_pylist() for file in lake.open("item_features").file_uris()]
    ranges = sorted(file for file in files if file)
    joined = [index for file in ranges for index in file]
    assert len(ranges) == 2 and joined == list(range(30)), "one range of item_index a file, in order"
    stats = lake.read("richness_stats").to_pylist()[0]
    assert stats["richness_source"] == "norm"
    assert second.facts["spearman"] == round(stats["spearman"], 3)
    assert "spearman" not in first.facts


def test_a_second_run_writes_nothing(done):
    _, lake, tracks = done
    assert [context.status for context in tracks] == ["done", "done", "up to date"]
    names = ("rejected_rows", "item_stats", "user_stats", "sequences", "ranking_samples", "item_features")
    assert lake.versions(*names) == dict.fromkeys(names, 0)
    assert lake.versions("catalog_stats", "richness_stats") == {"catalog_stats": 0, "richness_stats": 0}
    assert tracks[2].facts == tracks[1].facts


def test_other_buckets_write_the_same_rows_and_no_later_stage_runs(done, tmp_path, monkeypatch):
    """Also where items are too many to broadcast, so that events get their index by an exchange."""
    monkeypatch.setattr(events, "fits_broadcast", lambda frame: False)
    shutil.copytree(done[0].run_dir, tmp_path / "t")
    cfg = config(tmp_path, features={**done[0].features.model_dump(), "user_buckets": 5})
    lake = Lake(str(tmp_path / "t" / "lake"), {})
    names = ("item_stats", "user_stats", "sequences", "ranking_samples")

    def rows():
        return [sorted(({**row, "bucket": 0} for row in part), key=str) for part in content(lake, *names).values()]

    before, hashes, version = rows(), lake.input_hashes(lake.versions(*names)), lake.version("item_features")
    assert run(cfg).status != "up to date"
    assert len(lake.open("sequences").partitions()) > 3
    assert rows() == before
    for name in ("ranking_samples", "sequences"):
        assert all(in_order(pq.ParquetFile(file).read().to_pylist()) for file in lake.open(name).file_uris())
    assert lake.input_hashes(lake.versions(*names)) == hashes
    assert lake.version("item_features") == version
    assert run(cfg).status == "up to date"


def test_events_that_nobody_rated_are_split_as_ever(done):
    """Without low ratings the keys of the ranking split do not count: tables and models of before these keys stay up to
    date."""
    cfg, lake, _ = done
    for changes in ({"ranking_holdout": (0.2, 0.2)}, {"ranking_split": "auto", "positive_rating": 1.0}):
        features = cfg.features.model_copy(update=changes)
        unread = events._LATER | {"user_buckets", "ranking_split", "ranking_holdout"}
        before = features.model_dump(mode="json", exclude=unread)
        mark = digest(
            events.EVENTS.prefix,
            before,
            cfg.seed,
            MODALITIES,
            lake.input_hashes(lake.versions("items", "interactions")),
        )
        assert stage.resolve(events.EVENTS, cfg.model_copy(update={"features": features}), lake).hash == mark
    features = cfg.features.model_copy(update={"ranking_holdout": (0.2, 0.2)})
    assert stage.check_fresh(events.EVENTS, cfg.model_copy(update={"features": features}), lake)


def test_settings_of_the_second_part_leave_the_first_alone(done):
    cfg, lake, _ = done
    features = cfg.features.model_copy(update={"proxy_min_spearman": 0.9})
    assert stage.check_fresh(events.EVENTS, cfg.model_copy(update={"features": features}), lake)


def test_neither_row_order_nor_partitioning_changes_a_table(spark, done, tmp_path, capsys):
    cfg = config(tmp_path)
    lake = prepare(spark, cfg, *catalogue(), order=5)
    assert run(cfg).status == "done"
    assert (
        "item_features waits, table behavior_embeddings does not exist yet: run `python jobs/train.py --stage behavior`"
        in capsys.readouterr().err
    )
    with pytest.raises(InputError, match="behavior_embeddings does not exist yet"):
        run(cfg, "items")
    missing = lake.read("item_stats").to_pylist()[0]
    assert missing["interactions"] > 0
    embed(lake, drop=1)
    context = run(cfg)
    assert (context.status, context.facts["without behaviour embedding"]) == ("done", 1)
    assert "1 of 30 items have training events but no behaviour embedding" in capsys.readouterr().err
    found = {row["item_id"]: row for row in lake.read("item_features").to_pylist()}
    assert (found[missing["item_id"]]["behavior"], found[missing["item_id"]]["richness"], len(found)) == (None, 0.0, 30)
    assert lake.lineage("item_features") == lake.versions("items", "item_stats", "behavior_embeddings")
    assert lake.lineage("item_stats") == lake.lineage("sequences") == lake.versions("items", "interactions")
    embed(lake)
    run(cfg, "items")
    names = (
        "rejected_rows",
        "item_stats",
        "user_stats",
        "sequences",
        "ranking_samples",
        "item_features",
        "catalog_stats",
        "richness_stats",
    )
    other, here = content(lake, *names), content(done[1], *names)
    for name in names:
        assert other[name] == here[name], name


def test_a_behaviour_column_and_events_with_pos_only(spark, tmp_path, capsys):
    rows, seen = catalogue()
    vectors = {row[0]: None if row[0] == "i05" else [3.0, 4.0 * (i % 3)] for i, row in enumerate(rows)}
    cfg = config(
        tmp_path, behavior={"source": "column"}, source={"kind": "synthetic", "synthetic": {"behavior_width": 2}}
    )
    cfg = cfg.model_copy(
        update={"features": cfg.features.model_copy(update={"proxy_min_spearman": 0.95, "ranking_split": "auto"})}
    )
    lake = prepare(
        spark,
        cfg,
        [(*row, vectors[row[0]]) for row in rows],
        [(user, item, None, i, rating, None) for i, (user, item, _, _, rating, _) in enumerate(seen)],
    )
    run(cfg)
    told = capsys.readouterr().err
    assert (
        "richness is min-max of log(1 + count)" in told
        and "not all have a timestamp: ranking is split as retrieval is" in told
    )
    found = {row["item_id"]: row for row in lake.read("item_features").to_pylist()}
    assert {item: row["norm"] for item, row in found.items()} == {
        item: vector and pytest.approx(np.linalg.norm(vector)) for item, vector in vectors.items() if item
    }
    assert (found["i05"]["richness"], found[COLD[0]]["behavior"], found[COLD[0]]["richness"]) == (
        0,
        vectors[COLD[0]],
        0,
    )
    stats, richness = (lake.read(name).to_pylist()[0] for name in ("catalog_stats", "richness_stats"))
    assert (richness["richness_source"], stats["ranking_split"]) == ("count", "leave_one_out")  # rated, without times
    samples = lake.read("ranking_samples").to_pylist()
    assert {row["time"] for row in samples} == {None}
    ids = {row["item_index"]: row["item_id"] for row in lake.read("item_stats").to_pylist()}
    places = sorted(samples, key=lambda row: row["position"])
    of_user = [ids[row["item_index"]] for row in places if row["user_id"] == "u03"]
    assert of_user == [item for user, item, *_ in seen if user == "u03"]


def exchanges(spark, frame):
    """Partitioning of every shuffle in the executed plan of ``frame``, those of the cached frames below it included,
    each once."""
    frame.collect()
    seen, found = set(), []

    def walk(plan):
        name, itself = plan.nodeName(), spark._jvm.java.lang.System.identityHashCode(plan)
        if itself in seen:
            return
        seen.add(itself)
        if name == "Exchange":
            found.append(plan.outputPartitioning().toString())
        if name == "InMemoryTableScan":
            walk(plan.relation().cachedPlan())
        elif name == "AdaptiveSparkPlan":
            walk(plan.executedPlan())
        elif name.endswith("QueryStage"):
            walk(plan.plan())
        children = plan.children()
        for i in range(children.size()):
            walk(children.apply(i))

    walk(frame._jdf.queryExecution().executedPlan())
    return found


@pytest.mark.parametrize("broadcast", [True, False])
def test_shuffles_are_as_few_as_the_plan_needs(spark, done, broadcast):
    cfg, lake, _ = done
    limits = {
        "spark.sql.autoBroadcastJoinThreshold": "10MB" if broadcast else "-1",
        "spark.sql.adaptive.autoBroadcastJoinThreshold": "10MB" if broadcast else "-1",
    }
    for key, value in limits.items():
        spark.conf.set(key, value)
    try:
        with tracking.stage(cfg, "count") as context:
            checked = check.check(spark, cfg, lake, "count", context.note)
            clean = events.prepare(checked, cfg.features, context)
            of_events = exchanges(spark, clean.events)
            stats = statistics.item_stats(checked.items, statistics.trained(clean.events, USER), cfg.features)
            indexed = events._indexed(clean.events, stats, checked.users)
            of_sequences = exchanges(spark, histories.sequences(indexed, 5, USER))
            spark.catalog.clearCache()
            of_items = exchanges(spark, items.join(spark, cfg, lake))
    finally:
        for key in limits:
            spark.conf.unset(key)
    # Items by item_id (which duplicate is kept) and events by user_id (de-duplication and both windows share it). Where
    # the
    # accepted ids are too many to broadcast, the events also go by item_id to meet them.
    # The users' ranks go by user_id, and the ranks and the events by part.
    by_part = [where for where in of_events if "_part" in where]
    assert sum("user_id" in where for where in of_events) == 1, of_events
    assert len(by_part) == 2 and all(where.startswith("hashpartitioning(_part") for where in by_part), of_events
    assert sum("item_id" in where for where in of_events) == (1 if broadcast else 2), of_events
    # Histories stay where the events are; only the indices of items too many to broadcast come by part.
    assert sum("_part" in where for where in of_sequences) == (2 if broadcast else 3), of_sequences
    # Each of items, item_stats and behavior_embeddings by item_id, the last two only where they are too big to
    # broadcast.
    assert all("item_id" in where for where in of_items), of_items
    assert len(of_items) == (1 if broadcast else 3), of_items
