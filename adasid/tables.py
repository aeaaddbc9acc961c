"""This module defines every table of the lake: its Arrow schema, its key and the meaning of a row. Column names are
spelled only here.

``items``, ``item_features`` and ``behavior_embeddings`` store embeddings as ``list<float>``. The content modalities of
a run decide the columns, so those schemas are functions of the modality names."""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa

PAD = -1
"""Code of a slot whose modality the item lacks. PAD is not in any codebook and never counts as an overlap."""

BEHAVIOR = "behavior"
STRATA = ("head", "mid", "tail", "cold")
SPLITS = ("train", "validation", "test")
RANKING_ONLY = "ranking"
"""Split of an event that the ranking model trains on and that is held out for retrieval: no embedding, count or SID is
computed from it."""

VECTOR = pa.list_(pa.float32())
PICTURE = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
"""A picture: its file's bytes, or else where the file is. Hugging Face's datasets store pictures in this form."""


def _schema(*fields: tuple[str, pa.DataType, bool]) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable) for name, kind, nullable in fields])


def items(modalities: Iterable[str], texts: Iterable[str] = (), pictures: Iterable[str] = ()) -> pa.Schema:
    """Return the schema of ``items``. Key: item_id. A row is an item as the user supplied it, unchecked; a modality is
    null where the item lacks it. ``texts`` and ``pictures``: raw fields that encoders read (``content.encoders``)."""
    vectors = ((modality, VECTOR, True) for modality in modalities)
    raw = [(name, pa.string(), True) for name in texts if name != "title"]
    raw += [(name, PICTURE, True) for name in pictures]
    return _schema(("item_id", pa.string(), True), ("title", pa.string(), True), *vectors, *raw)


INTERACTIONS = _schema(
    ("user_id", pa.string(), True),
    ("item_id", pa.string(), True),
    ("timestamp", pa.string(), True),
    ("pos", pa.int64(), True),
    ("rating", pa.float32(), True),
    ("label", pa.float32(), True),
)
"""An event as the user supplied it, unchecked. ``timestamp`` is text (a unix time, or ISO 8601) and is parsed with the
checks; ``pos`` orders the events of a user where time does not. At least one of the two is set. ``label``: 1 for a
positive event, 0 for a negative one (an impression without a click); ``rating``: how much the user liked the item, on
any scale."""

IN_PLACE = _schema(("location", pa.string(), False), ("version", pa.int64(), False))
"""The one row of ``items`` or ``interactions`` where the rows stay at the source (``source.tables.in_place``): a Delta
table and its version."""

REJECTED_ROWS = _schema(
    ("input_hash", pa.string(), False),
    ("table", pa.string(), False),
    ("row_hash", pa.string(), False),
    ("reason", pa.string(), False),
    ("row", pa.string(), False),
    ("copies", pa.int64(), False),
)
"""Key input_hash, table, row_hash. A rejected input row (``row`` is JSON) with the reason; ``input_hash``: of the stage
run that rejected it."""

TRUTH = _schema(
    ("item_id", pa.string(), False),
    ("topic", pa.int32(), False),
    ("expected_count", pa.float64(), False),
    ("behavior_noise", pa.float32(), False),
)
"""Key item_id. Ground truth of the synthetic catalogue; ``behavior_noise`` is the norm of the noise on the planted
behaviour."""

CONTENT_ENCODERS = _schema(
    ("modality", pa.string(), False),
    ("encoder", pa.string(), False),
    ("identity", pa.string(), False),
    ("width", pa.int64(), True),
)
"""Key modality. The encoder of a modality whose vectors are in use: ``identity`` is JSON with all on which a vector
depends (model, revision, width, ...), ``encoder`` its digest. ``width`` is null where a model's vectors are not cut."""

CONTENT_EMBEDDINGS = _schema(
    ("modality", pa.string(), False),
    ("encoder", pa.string(), False),
    ("fingerprint", pa.string(), False),
    ("vector", VECTOR, True),
    ("reason", pa.string(), True),
    ("added", pa.string(), False),
)
"""Key modality, encoder, fingerprint. The vector of a raw content, whichever items have it; null with a ``reason``
where it cannot be encoded. ``fingerprint``: MD5 of the raw fields; ``added``: names the commit that added the row."""

CONTENT_QUALITY = _schema(
    ("input_hash", pa.string(), False),
    ("modality", pa.string(), False),
    ("items", pa.int64(), False),
    ("missing", pa.int64(), False),
    ("sample", pa.int64(), False),
    ("effective_rank", pa.float64(), True),
    ("near_duplicates", pa.float64(), True),
    ("agreement", pa.float64(), True),
    ("chance", pa.float64(), True),
    ("neighbours", pa.int64(), False),
    ("near_duplicate", pa.float64(), False),
)
"""Key input_hash, modality; written with ``item_features``. Of a modality: items with and without a vector, and of a
``sample`` of these, evenly spaced by popularity: the effective rank of the vectors, the share of them that have a
near-duplicate in the sample, and the share of their nearest neighbours that have their category, beside that of any
two items (``chance``); null where it is not defined. ``neighbours`` and ``near_duplicate``: number of nearest items and
cosine with which it was measured."""

ITEM_STATS = _schema(
    ("item_id", pa.string(), False),
    ("item_index", pa.int64(), False),
    ("interactions", pa.int64(), False),
    ("users", pa.int64(), False),
    ("stratum", pa.string(), False),
)
"""Key item_id. Counts on the training part; ``item_index`` is the 0-based rank by (interactions desc, item_id): a dense
index of all items."""

USER_STATS = _schema(
    ("user_id", pa.string(), False),
    ("user_index", pa.int64(), False),
    ("interactions", pa.int64(), False),
    ("items", pa.int64(), False),
)
"""Key user_id. Counts on the training part; ``user_index``: as in ``ranking_samples``."""

SEQUENCES = _schema(
    ("bucket", pa.int32(), False),
    ("user_id", pa.string(), False),
    ("user_index", pa.int64(), False),
    ("split", pa.string(), False),
    ("history", pa.list_(pa.int64()), False),
    ("target", pa.int64(), True),
)
"""Key user_id, split; partitioned by ``bucket`` and sorted by ``user_index`` within a file, as ``ranking_samples`` is.
``history``: item_index in time order, oldest first. In ``train`` every event but the first is a target and ``target``
is null; in ``validation`` and ``test`` ``target`` is the held-out item that follows ``history``."""

RANKING_SAMPLES = _schema(
    ("bucket", pa.int32(), False),
    ("user_id", pa.string(), False),
    ("user_index", pa.int64(), False),
    ("item_index", pa.int64(), False),
    ("time", pa.timestamp("us", tz="UTC"), True),
    ("position", pa.int64(), False),
    ("rating", pa.float32(), True),
    ("label", pa.int32(), True),
    ("in_history", pa.bool_(), False),
    ("split", pa.string(), False),
)
"""Key user_id, position; partitioned by ``bucket`` = pmod(xxhash64(user_id), ``features.user_buckets``), sorted by
``user_index``, position within a file. ``user_index`` is the 0-based rank of user_id among all users with a clean
event: a dense index; ``item_index``: as in ``item_stats``. A clean event; ``position`` is its 0-based index among all
events of the user. The history of an event consists of the earlier events with ``in_history``
(``features.histories``), without those of its time if some of that time are not ``in_history`` (a slate). ``label`` is
null where only other events are rated. ``split`` is specific to ranking (``features.ranking_split``): one of
``SPLITS``, where ``train`` means that no task holds the event out, or ``RANKING_ONLY``."""

RANKING_SCORES = _schema(
    ("user", pa.int64(), False),
    ("stratum", pa.string(), False),
    ("label", pa.int32(), False),
    ("score", pa.float64(), False),
)
"""A scored test sample of a ranking model. Workers write these rows as shards to their folder if there are many;
``stratum``: of the item."""

ITEM_PAIRS = _schema(
    ("item_index", pa.int64(), False),
    ("partner_index", pa.int64(), False),
    ("score", pa.float64(), False),
    ("users", pa.int64(), False),
)
"""Key item_index, partner_index; in the order of item_index, then of (score desc, partner_index). A co-engaged partner
of an item, one of its top partners by that order, from the training part; ``users``: how many have both (swing: of the
users compared). Written where ``features.pairs.method`` is not ``none``."""

PREVIOUS_CODES = _schema(
    ("item_index", pa.int64(), False),
    ("codes", pa.list_(pa.int32()), False),
)
"""Key item_index. Published codes of current items that have some: the previous codes that a retrained tokenizer tries
to preserve."""

BEHAVIOR_EMBEDDINGS = _schema(
    ("item_id", pa.string(), False),
    ("item_index", pa.int64(), False),
    (BEHAVIOR, VECTOR, False),
    ("norm", pa.float32(), False),
)
"""Key item_id. Behaviour embedding (best validation epoch) and the norm that measures richness (early checkpoint), for
items in events that SASRec was trained on."""

BEHAVIOR_SHARD = _schema(("item_index", pa.int64(), False), ("embedding", VECTOR, False), ("norm", pa.float32(), False))
"""Rows of the items that were trained on, which a worker leaves in its folder; Spark adds the ids and writes
``behavior_embeddings``."""


def item_features(content: Iterable[str]) -> pa.Schema:
    """Return the schema of ``item_features``, the tokenizer's input. Key: item_id.

    Columns: embeddings by modality (null where an item has none; ``behavior`` is null for cold items), ``norm`` of the
    behaviour embedding (null for cold items), ``richness`` in [0, 1] (0 for cold items), stratum, fingerprint of the
    vectors."""
    vectors = ((modality, VECTOR, True) for modality in (*content, BEHAVIOR))
    return _schema(
        ("item_id", pa.string(), False),
        ("item_index", pa.int64(), False),
        ("interactions", pa.int64(), False),
        ("stratum", pa.string(), False),
        ("title", pa.string(), True),
        *vectors,
        ("norm", pa.float32(), True),
        ("richness", pa.float32(), False),
        ("fingerprint", pa.string(), False),
    )


_CURVE = pa.list_(pa.struct([pa.field("x", pa.float64()), pa.field("y", pa.float64())]))
_SPREAD = pa.list_(
    pa.struct(
        [
            pa.field("x", pa.float64()),
            pa.field("items", pa.int64()),
            *(pa.field(f"p{q}", pa.float64()) for q in (10, 50, 90)),
        ]
    )
)

CATALOG_STATS = _schema(
    ("input_hash", pa.string(), False),
    ("items", pa.int64(), False),
    ("users", pa.int64(), False),
    ("interactions", pa.int64(), False),
    ("train_interactions", pa.int64(), False),
    ("duplicates", pa.int64(), False),
    ("duplicate_items", pa.int64(), True),
    ("capped", pa.int64(), True),
    ("below_k_core", pa.int64(), True),
    ("tied", pa.int64(), True),
    ("outside_histories", pa.int64(), True),
    ("missing", pa.map_(pa.string(), pa.int64()), True),
    ("rejected", pa.map_(pa.string(), pa.int64()), False),
    ("ranking_split", pa.string(), True),
    ("user_buckets", pa.int64(), True),
    ("strata", pa.map_(pa.string(), pa.int64()), False),
    ("gini", pa.float64(), False),
    ("head_interactions", pa.float64(), False),
    ("popularity", _CURVE, False),
    ("lorenz", _CURVE, False),
)
"""Key input_hash; one row. Rows of ``interactions`` are ``interactions`` + ``duplicates`` + ``capped`` (beyond
``features.max_user_events``) + ``below_k_core`` + rejected; rows of ``items`` are ``items`` + ``duplicate_items``
(identical copies) + rejected. ``tied``: events that share user, time and pos with another one, and are ordered by a
seeded hash; ``outside_histories``: events that only ranking uses (``features.histories``); ``missing``: modality ->
items that lack it; ``rejected``: reason -> rows of both tables, including lines that ingest could not parse;
``ranking_split``: how ``ranking_samples`` are split; ``user_buckets``: of these and ``sequences``; ``strata``:
stratum -> items; ``head_interactions``: share of training events on head items. ``popularity``: x = rank (1-based,
about 100 log-spaced), y = training count at that rank. ``lorenz``: x = share of items (least popular first), y = share
of events (101 points)."""

RICHNESS_STATS = _schema(
    ("input_hash", pa.string(), False),
    ("norm_low", pa.float64(), False),
    ("norm_high", pa.float64(), False),
    ("norm_quantiles", _CURVE, False),
    ("norm_by_count", _SPREAD, False),
    ("spearman", pa.float64(), False),
    ("richness_source", pa.string(), False),
    ("richness_quantiles", _CURVE, False),
)
"""Key input_hash; one row, written with ``item_features``: the clipping bounds and quantiles of the norm of the
behaviour embeddings (x in percent), its spread within log-spaced bins of the count (x = geometric middle),
Spearman(norm, count) over items with events, whether richness comes from the ``norm`` or, as a fallback, from the
``count``, and quantiles of richness (x in percent)."""

SIDS = _schema(
    ("item_id", pa.string(), False),
    ("codes", pa.list_(pa.int32()), False),
    ("weights", VECTOR, False),
    ("active", pa.list_(pa.bool_()), False),
    ("tokens", pa.list_(pa.string()), False),
    ("collision_rank", pa.int32(), False),
    ("tokenizer", pa.string(), False),
    ("generation", pa.int64(), False),
    ("fingerprint", pa.string(), False),
    (
        "gauges",
        pa.list_(pa.struct([("modality", pa.string()), ("norm", pa.float64()), ("error", pa.float64())])),
        False,
    ),
)
"""Key item_id. ``codes``: L codes in slot order (PAD where the item lacks the slot's modality); ``weights``: 1 for
shared and content slots, the router's value for behaviour slots, 0 where inactive; ``collision_rank``: 0-based rank
among the items of one SID, constant while the item has the SID: after the items that had it before, and by
(interactions desc, item_id) among those that got it together; ``tokenizer``: artifact digest; ``gauges``: norm and
squared quantization error of each vector of the items sampled for drift (``retokenize.sample``), else empty."""

SID_CHANGES = _schema(
    ("generation", pa.int64(), False),
    ("item_id", pa.string(), False),
    ("old_codes", pa.list_(pa.int32()), True),
    ("new_codes", pa.list_(pa.int32()), True),
    ("why", pa.string(), False),
)
"""Key generation, item_id. An item whose SID changed in a generation, with the reason: ``new``, ``changed`` (its
vectors changed), ``removed``, or the policy (``warm``, ``refit``). ``old_codes`` is null for a new item, ``new_codes``
for a removed one."""

GENERATIONS = _schema(
    ("generation", pa.int64(), False),
    ("parent", pa.int64(), True),
    ("sids_version", pa.int64(), False),
    ("inputs", pa.string(), False),
    ("tokenizer", pa.string(), False),
    ("artifact", pa.string(), False),
    ("run", pa.string(), False),
    ("run_date", pa.string(), True),
    ("policy", pa.string(), False),
    ("items", pa.int64(), False),
    ("gates", pa.string(), False),
    ("metrics", pa.string(), False),
    ("drift", pa.string(), False),
    ("churn", pa.string(), False),
)
"""Key generation. A published generation: its parent (the generation that was live before), the version of ``sids``,
table versions read, the tokenizer's artifact digest and folder, the date of the nightly run (null outside the nightly
job), the policy (``full``, ``frozen``, ``warm``, ``refit``), gates passed, code metrics, drift and churn against the
parent (JSON each)."""

LIVE = _schema(("generation", pa.int64(), False), ("sids_version", pa.int64(), False), ("hold", pa.bool_(), True))
"""One row: the live generation, whose version of ``sids`` readers use. Publishing or rolling back changes it in one
commit. ``hold``: while true, no other generation is published (null, or missing in older tables: false)."""

LEASES = _schema(("holder", pa.string(), True), ("expires", pa.float64(), False), ("seconds", pa.float64(), False))
"""One row: the process that may publish, and for how many seconds after its last renewal, which is the table's last
commit. ``holder`` is null while the lease is free. ``expires`` (unix seconds, by the holder's clock) is for people;
nothing compares it."""
