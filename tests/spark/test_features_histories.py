"""Test de-duplication, k-core, order, splits and sequences against hand-computed answers and a brute-force k-core."""

from __future__ import annotations

from collections import Counter
from datetime import datetime, timezone

import numpy as np
import pytest
from pyspark.sql import functions as F

from adasid.config import Features
from adasid.errors import InputError
from pipelines.features import check, events, histories, labels, layout

SCHEMA = "user_id string, item_id string, time timestamp, pos bigint, rating float, label int, in_history boolean"
SEED = 17


def at(second):
    return None if second is None else datetime.fromtimestamp(second, timezone.utc)


def frame(spark, rows, seed=SEED):
    """rows: user, item, second or None, pos or None, rating or None; and, where given, the label, which 0 puts outside
    histories."""
    padded = [(*row, 1)[:6] for row in rows]
    return spark.createDataFrame(
        [(user, item, at(second), pos, rating, label, label != 0) for user, item, second, pos, rating, label in padded],
        SCHEMA,
    ).select("*", F.col("item_id").alias(layout.ITEM), histories.chance(seed))


def placed(spark, rows, **settings):
    ordered = histories.order(frame(spark, rows), Features(**settings))
    return {(row["user_id"], row["position"]): (row["item_id"], row["split"]) for row in ordered.collect()}


def test_sorted_events_lose_the_same_copies(spark):
    rng = np.random.default_rng(5)
    rows = [
        (f"u{user}", f"i{item}", None if pos else second, second if pos else None, float(rating), int(label))
        for user, item, second, pos, rating, label in rng.integers([4, 3, 4, 2, 3, 2], size=(300, 6)).tolist()
    ]
    found, expected = (
        sorted(map(str, left.drop(histories.CHANCE).collect()))
        for left in (
            histories.deduplicate_sorted(frame(spark, rows)),
            histories.deduplicate(frame(spark, rows), "exact"),
        )
    )
    assert found == expected and 0 < len(found) < len(rows)


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ("none", [("a", 1), ("a", 1), ("a", 2), ("b", 1), ("p", 3), ("p", 4)]),
        ("exact", [("a", 1), ("a", 2), ("b", 1), ("p", 3), ("p", 4)]),
        ("pair", [("a", 1), ("b", 1), ("p", 3)]),
    ],
)
def test_deduplicate(spark, how, kept):
    rows = [
        ("u", "a", 1, None, None),
        ("u", "a", 1, 5, None),
        ("u", "a", 2, None, None),
        ("u", "b", 1, None, None),
        ("u", "p", None, 3, None),
        ("u", "p", None, 4, None),
    ]
    found = (
        histories.deduplicate(frame(spark, rows), how)
        .selectExpr("item_id", "coalesce(unix_seconds(time), pos) AS place")
        .collect()
    )
    assert sorted((row["item_id"], row["place"]) for row in found) == kept


def brute_core(events, least):
    while True:
        users, items = Counter(user for user, _ in events), Counter(item for _, item in events)
        kept = [(user, item) for user, item in events if users[user] >= least and items[item] >= least]
        if len(kept) == len(events):
            return kept
        events = kept


def test_k_core_reaches_the_fixed_point_that_brute_force_finds(spark):
    rng = np.random.default_rng(3)
    events = sorted({(f"u{rng.integers(25)}", f"i{int(rng.zipf(1.6)) % 18}") for _ in range(110)})
    expected = brute_core(events, 3)
    assert 0 < len(expected) < len(events)
    rows = frame(
        spark, [(user, item, second, None, None) for second, (user, item) in enumerate(events)]
    ).localCheckpoint()
    core, fixed = histories.k_core(rows, 3, 20)
    assert fixed
    assert sorted((row["user_id"], row["item_id"]) for row in core.collect()) == expected
    assert histories.k_core(rows, 3, 1)[1] is False


def test_order_is_time_then_pos(spark):
    rows = [
        ("u", "d", 2, None, None),
        ("u", "c", 1, 2, None),
        ("u", "b", 1, 0, None),
        ("u", "a", 1, 1, None),
        ("v", "z", None, 1, None),
        ("v", "y", None, 0, None),
    ]
    assert {key: item for key, (item, _) in placed(spark, rows).items()} == {
        ("u", 0): "b",
        ("u", 1): "a",
        ("u", 2): "c",
        ("u", 3): "d",
        ("v", 0): "y",
        ("v", 1): "z",
    }


def test_ties_are_ordered_by_a_seeded_hash_and_counted(spark):
    rows = [(f"u{user:02d}", f"i{item}", 5, None, None) for user in range(60) for item in range(4)] + [
        ("v", "a", 1, 0, None),
        ("v", "b", 1, 1, None),
    ]

    def orders(seed, partitions):
        placed = histories.order(frame(spark, rows, seed).repartition(partitions, "item_id"), Features()).collect()
        tied = {row["user_id"] for row in placed if row["tied"]}
        users = {row["user_id"]: [] for row in placed}
        for row in sorted(placed, key=lambda row: row["position"]):
            users[row["user_id"]].append(row["item_id"])
        return users, tied

    users, tied = orders(SEED, 3)
    assert tied == {f"u{user:02d}" for user in range(60)}, "v has pos"
    assert users == orders(SEED, 2)[0] and users != orders(SEED + 1, 2)[0]
    first = Counter(items[0] for user, items in users.items() if user != "v")
    assert all(abs(count - 15) < 5 * (60 * 0.25 * 0.75) ** 0.5 for count in first.values()) and len(first) == 4, (
        first
    )  # any item may come first


def test_impressions_are_in_no_history_and_are_split_with_the_visit_that_follows(spark):
    rows = [
        ("u", "a", 1, None, None),
        ("u", "x", 2, None, None, 0),
        ("u", "b", 3, None, None),
        ("u", "y", 4, None, None, 0),
        ("u", "c", 5, None, None),
        ("u", "z", 6, None, None, 0),
        ("u", "d", 7, None, None),
        ("u", "w", 8, None, None, 0),
    ]
    ordered = histories.order(frame(spark, rows), Features())
    found = {row["item_id"]: (row["split"], row["ranking_split"], row["place"]) for row in ordered.collect()}
    assert found == {
        "a": ("train", "train", 0), "x": (None, "ranking", 1), "b": ("train", "train", 1), "y": (None, "validation", 2),
        "c": ("validation", "validation", 2), "z": (None, "test", 3), "d": ("test", "test", 3), "w": (None, "test", 4),
    }  # fmt: skip
    later = histories.order(frame(spark, rows), Features(ranking_split="global_time", ranking_holdout=(0.25, 0.25)))
    by_time = {row["item_id"]: (row["split"], row["ranking_split"]) for row in later.collect()}
    assert by_time == {
        "a": ("train", "train"), "x": (None, "ranking"), "b": ("train", "train"), "y": (None, "ranking"),
        "c": ("validation", "validation"), "z": (None, "validation"), "d": ("test", "test"), "w": (None, "test"),
    }  # fmt: skip
    indexed = ordered.selectExpr("*", "CAST(ascii(item_id) AS bigint) AS item_index")
    made = {row["split"]: (row["history"], row["target"]) for row in histories.sequences(indexed, 5).collect()}
    a, b, c, d = map(ord, "abcd")
    assert made == {"train": ([a, b], None), "validation": ([a, b], c), "test": ([a, b, c], d)}


def test_the_impressions_of_a_slate_are_split_with_its_visit(spark):
    slates = [(f"{name}{number}", second) for second, name in enumerate("abcd") for number in range(20)]

    def splits(*clicked):
        rows = [("u", item, second, None, None, int(int(item[1:]) in clicked)) for item, second in slates]
        found = {name: Counter() for name in "abcd"}
        for row in histories.order(frame(spark, rows), Features()).collect():
            found[row["item_id"][0]][row["ranking_split"]] += 1
        return found

    trained = {"train": 1, "ranking": 19}
    assert splits(7) == {"a": trained, "b": trained, "c": {"validation": 20}, "d": {"test": 20}}
    several = {"train": 3, "ranking": 17}  # the last slate has a click of each split: its impressions are in the test
    assert splits(3, 7, 9) == {
        **dict.fromkeys("abc", several),
        "d": {"train": 1, "validation": 1, "test": 18},
    }


def test_an_impression_does_not_hide_a_visit(spark):
    rows = [
        ("u", "a", 1, None, None, 0),
        ("u", "a", 1, None, None, 1),
        ("u", "a", 2, None, None, 1),
        ("v", "a", 1, None, None, 0),
    ]

    def kept(how):
        left = (
            histories.deduplicate(frame(spark, rows), how)
            .selectExpr("user_id", "unix_seconds(time) AS at", "label")
            .collect()
        )
        return sorted(tuple(row) for row in left)

    assert kept("exact") == [("u", 1, 1), ("u", 2, 1), ("v", 1, 0)]
    assert kept("pair") == [("u", 1, 0), ("u", 1, 1), ("v", 1, 0)]


def test_the_latest_events_of_a_heavy_user_are_kept(spark):
    rows = [("bot", f"i{second % 7}", second, None, None) for second in range(50)] + [("u", "i0", 1, None, None)]
    left = histories.cap(frame(spark, rows), 10).selectExpr("user_id", "unix_seconds(time) AS at").collect()
    assert sorted(row["at"] for row in left if row["user_id"] == "bot") == list(range(40, 50)) and len(left) == 11


def test_leave_one_out_needs_three_events(spark):
    rows = [
        (user, f"i{second}", second, None, None)
        for user, events in (("one", 1), ("two", 2), ("three", 3), ("four", 4))
        for second in range(events)
    ]
    splits = {
        user: [split for (who, _), (_, split) in sorted(placed(spark, rows).items()) if who == user]
        for user in ("one", "two", "three", "four")
    }
    assert splits == {
        "one": ["train"],
        "two": ["train"] * 2,
        "three": ["train", "validation", "test"],
        "four": ["train", "train", "validation", "test"],
    }


def test_global_time_cuts_by_time_and_keeps_ties_together(spark):
    rows = [(f"u{second % 3}", f"i{second}", second, None, None) for second in range(18)] + [
        ("u0", "x", 14, None, None),
        ("u1", "y", 14, None, None),
    ]
    found = {item: split for item, split in placed(spark, rows, split="global_time", holdout=0.1).values()}
    assert {item for item, split in found.items() if split == "test"} == {"i16", "i17"}
    assert {item for item, split in found.items() if split == "validation"} == {
        "i14",
        "i15",
        "x",
        "y",
    }  # the cut falls within second 14, which stays whole
    with pytest.raises(InputError, match="no training part is left"):
        placed(spark, [("u", "a", 5, None, None), ("u", "b", 5, None, None)], split="global_time", holdout=0.1)
    with pytest.raises(
        InputError, match=r"features.ranking_split is 'global_time' .* set features.ranking_split: same"
    ):
        placed(spark, [("u", "a", 5, None, None), ("u", "b", 5, None, None)], ranking_split="global_time")


def test_what_one_task_holds_out_is_training_for_neither(spark):
    rows = [("u", f"i{second}", second, None, None) for second in range(6)] + [
        ("v", f"i{second}", second, None, None) for second in range(4, 10)
    ]
    ordered = histories.order(frame(spark, rows), Features(ranking_split="global_time", ranking_holdout=(0.2, 0.2)))
    found = {(row["user_id"], row["item_id"]): (row["split"], row["ranking_split"]) for row in ordered.collect()}
    assert [found["u", f"i{second}"] for second in range(6)] == [("train", "train")] * 4 + [
        ("validation", "ranking"),
        ("test", "validation"),
    ]
    assert [found["v", f"i{second}"] for second in range(4, 10)] == [
        ("train", "train"),
        (None, "validation"),
        (None, "validation"),
        (None, "validation"),
        ("validation", "test"),
        ("test", "test"),
    ]


class Notes:
    def note(self, text):
        raise AssertionError(text)


def checked_events(spark, rows):
    """Accepted events, as the checks give them."""
    users = layout.layout(spark, 2)
    judged = frame(spark, rows).drop("in_history").selectExpr("*", "CAST(NULL AS string) AS reason")
    judged = judged.withColumn(layout.PART, users.part())
    figures = judged.agg(F.count("*").alias("rows"), *labels.sums(), *histories.sums()).first().asDict()
    return check.Checked(judged, judged, figures, {}, 0, {}, users)


def test_settings_that_the_data_cannot_meet(spark):
    checked = checked_events(spark, [("u", "a", 1, None, None), ("u", "b", None, 2, None)])
    with pytest.raises(InputError, match=r"features.split is 'global_time' but 1 events have no timestamp"):
        events.prepare(checked, Features(split="global_time"), Notes())
    with pytest.raises(
        InputError,
        match=(
            r"features.ranking_split is 'global_time' but 1 events have no timestamp: .* "
            r"features.ranking_split: same"
        ),
    ):
        events.prepare(checked, Features(ranking_split="global_time"), Notes())
    with pytest.raises(InputError, match=r"features.k_core 5 leaves no event of 2: lower it, or set it to 0"):
        events.prepare(checked, Features(k_core=5), Notes())
    with pytest.raises(AssertionError, match=r"k-core was still shrinking after features.k_core_rounds 1"):
        rows = [(user, item, 1, None, None) for user, item in ("ux", "uy", "vx", "vy", "wy", "wz")]
        events.prepare(checked_events(spark, rows), Features(k_core=2, k_core_rounds=1), Notes())


def test_the_index_counts_the_users_that_the_core_leaves(spark):
    rows = [("a", "x", 1, None, None), *((user, item, 1, None, None) for user in "uv" for item in "xy")]
    clean = events.prepare(checked_events(spark, rows), Features(k_core=2), Notes())
    assert {(row["user_id"], row["user_index"]) for row in clean.events.collect()} == {("u", 0), ("v", 1)}
    assert (clean.counts["below_k_core"], clean.counts["users"], clean.counts["duplicates"]) == (1, 2, 0)


def test_a_split_that_leaves_nothing_to_train_on_is_named(spark):
    rows = [("u", f"i{second}", second, None, None, int(second > 7)) for second in range(10)]
    with pytest.raises(
        InputError,
        match=r"no event is left to train on: of 10 events 8 are outside histories .* set features.ranking_split: same",
    ):
        events.prepare(checked_events(spark, rows), Features(ranking_split="global_time"), Notes())


def test_sequences(spark):
    def some(user, splits):
        return [(user, 10 * place, place, split, True) for place, split in enumerate(splits)]

    train, validation, test = "train", "validation", "test"
    rows = [
        *some("a", [train] * 5 + [validation, test]),
        *some("b", [train, validation, test]),
        *some("c", [train] * 2),
        *some("d", [train]),
        *some("e", [train, validation, validation, test, test]),
        *some("f", [validation, test]),
        *some("g", [test]),
    ]
    made = histories.sequences(
        spark.createDataFrame(
            rows, "user_id string, item_index bigint, place bigint, split string, in_history boolean"
        ).repartition(2),
        3,
    )
    found = {(row["user_id"], row["split"]): (row["history"], row["target"]) for row in made.collect()}
    assert found == {
        ("a", train): ([10, 20, 30, 40], None), ("a", validation): ([20, 30, 40], 50), ("a", test): ([30, 40, 50], 60),
        ("b", validation): ([0], 10), ("b", test): ([0, 10], 20),
        ("c", train): ([0, 10], None),
        ("e", validation): ([0], 10), ("e", test): ([0, 10, 20], 30),
        ("f", test): ([0], 10),
    }  # fmt: skip
