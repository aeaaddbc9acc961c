"""Generate the synthetic long-tail catalogue: items in topics, Zipf popularity, users who move through a few topics.

All values are drawn from Philox streams with the key (seed, purpose, block of 1,024 items or users), so any range can
be generated anywhere, with equal values for any chunks and workers. The only arrays as long as the catalogue are four
of 4 to 8 bytes an item, computed once a process. An event of any user is item i with probability p_i exactly (interests
are drawn by the popularity of topics, items within a topic by their own), hence the closed form of
:meth:`Catalog.expected_count`."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from adasid import tables
from adasid.config import Synthetic
from adasid.datasets.arrow import vectors

BLOCK = 1024
"""Items or users that share one random stream."""

MODALITIES = ("text", "visual", tables.BEHAVIOR)
INTERESTS = 3
"""Topics of a user, drawn by popularity with replacement; also the number of equally long phases of the history."""

IN_PHASE, POPULAR = 0.8, 0.1
"""Probability that an event is of the phase's topic (else of any interest); share of events drawn from the whole
catalogue instead."""

MIN_LENGTH, SPREAD = 5, 1.0
"""Shortest history; sigma of the log-normal activity beyond it."""

APART = 0.2
"""Norm of the noise of a near-copy relative to that of its original, to which it is added."""

BASE_TIME, STARTS, LONGEST_SPAN, DAY = 1_500_000_000, 730, 365, 86_400
"""Histories start within ``STARTS`` days after 2017-07-14 and last about a day an event, at most ``LONGEST_SPAN``
days."""


@dataclass(frozen=True)
class Catalog:
    """A ``Catalog`` is the planted structure of a catalogue; its arrays are computed on first use."""

    params: Synthetic
    seed: int

    def generator(self, purpose: str, block: int = 0) -> np.random.Generator:
        """Return the random generator of one purpose and block."""
        return np.random.Generator(
            np.random.Philox(np.random.SeedSequence([self.seed, zlib.crc32(purpose.encode()), block]))
        )

    @cached_property
    def rank(self) -> NDArray[np.int32]:
        """Return the popularity rank of each item (items,), 0 is the most popular."""
        return self.generator("rank").permutation(np.arange(self.params.items, dtype=np.int32))

    @cached_property
    def topic(self) -> NDArray[np.int32]:
        """Return the topic of each item (items,)."""
        drawn = self.generator("topic").integers(0, self.params.topics, self.params.items, dtype=np.int32)
        return np.where(self.twin, np.roll(drawn, 1), drawn)

    @cached_property
    def twin(self) -> NDArray[np.bool_]:
        """Return whether each item is a near-copy of the one before it (items,); only odd ones, so that no copy is
        copied."""
        drawn: NDArray[np.bool_] = self.generator("twins").random(self.params.items) < 2 * self.params.near_duplicates
        drawn[::2] = False
        return drawn

    @cached_property
    def total(self) -> float:
        """Return the sum of the Zipf weights."""
        return float(np.sum(self._weight(np.arange(self.params.items))))

    def _weight(self, rank: NDArray[np.integer]) -> NDArray[np.float64]:
        weight: NDArray[np.float64] = np.power(rank + 1.0, -self.params.popularity_exponent)
        return weight

    def expected_count(self, start: int, stop: int) -> NDArray[np.float64]:
        """Return the expected interactions of the items of a range (stop - start,): interactions * p_i."""
        return self.params.interactions * self._weight(self.rank[start:stop]) / self.total

    @cached_property
    def order(self) -> NDArray[np.int32]:
        """Return the items sorted by topic (items,)."""
        return np.argsort(self.topic, kind="stable").astype(np.int32)

    @cached_property
    def cdf(self) -> NDArray[np.float64]:
        """Return the cumulative p_i over ``order`` (items,)."""
        sums = np.cumsum(self._weight(self.rank[self.order]))
        sums /= sums[-1]
        return sums

    @cached_property
    def bounds(self) -> NDArray[np.int64]:
        """Start of each topic in ``order`` (topics + 1,)."""
        return np.concatenate([[0], np.cumsum(np.bincount(self.topic, minlength=self.params.topics))])

    @cached_property
    def edges(self) -> NDArray[np.float64]:
        """Return ``cdf`` at the borders of the topics (topics + 1,)."""
        return np.concatenate([[0.0], self.cdf[np.maximum(self.bounds[1:] - 1, 0)] * (self.bounds[1:] > 0)])

    def pick(self, uniform: NDArray[np.float64], topic: NDArray[np.int32] | None = None) -> NDArray[np.int32]:
        """Map numbers in [0, 1) to items by popularity: in the whole catalogue, or within ``topic`` (same shape; -1:
        whole catalogue)."""
        topic = np.full(uniform.shape, -1, np.int32) if topic is None else topic
        everywhere = topic < 0
        low, high = np.where(everywhere, 0.0, self.edges[topic]), np.where(everywhere, 1.0, self.edges[topic + 1])
        first, last = (
            np.where(everywhere, 0, self.bounds[topic]),
            np.where(everywhere, self.params.items, self.bounds[topic + 1]) - 1,
        )
        index = np.clip(np.searchsorted(self.cdf, low + uniform * (high - low), side="right"), first, last)
        item: NDArray[np.int32] = self.order[index]
        return item

    def width(self, modality: str) -> int:
        """Return the width of a modality's vectors."""
        return {
            "text": self.params.text_width,
            "visual": self.params.visual_width,
            tables.BEHAVIOR: self.params.behavior_width,
        }[modality]

    def topic_vectors(self, modality: str) -> NDArray[np.float32]:
        """Return the topics' unit vectors (topics, width)."""
        return _unit(
            self.generator(f"{modality} topics").standard_normal((self.params.topics, self.width(modality)), np.float32)
        )

    def noise_norm(self, start: int, stop: int) -> NDArray[np.float64]:
        """Return the norm of the noise on the planted behaviour, before scaling (stop - start,); 0 where none is
        planted."""
        planted = self.params.behavior_noise if self.params.behavior_width else 0.0
        return planted / np.sqrt(1 + self.expected_count(start, stop))


@lru_cache(maxsize=1)
def catalog(params: Synthetic, seed: int) -> Catalog:
    """Return the catalogue, cached in this process."""
    return Catalog(params, seed)


def items(params: Synthetic, seed: int, modalities: Sequence[str], start: int, stop: int) -> Iterator[pa.RecordBatch]:
    """Yield items ``start`` to ``stop`` as batches of ``tables.items(modalities)``.

    Content is the topic's unit vector + Gaussian noise of norm ``content_noise`` (root mean square); a near-copy has
    its original's content and a little more noise. ``behavior`` is log(1 + count) * (topic's unit vector + noise of
    norm ``behavior_noise / sqrt(1 + count)``), count being the expected one."""
    plan = catalog(params, seed)
    centres = {modality: plan.topic_vectors(modality) for modality in modalities}
    for block, first, last in _blocks(start, stop):
        begin, end = block * BLOCK, min((block + 1) * BLOCK, params.items)
        columns = [_ids("i", np.arange(first, last)), _titles(plan.topic[first:last], first)]
        for modality in modalities:
            values, present = _vectors(plan, modality, centres[modality][plan.topic[begin:end]], block)
            columns.append(vectors(values[first - begin : last - begin], present[first - begin : last - begin]))
        yield pa.RecordBatch.from_arrays(columns, schema=tables.items(modalities))


def truth(params: Synthetic, seed: int, start: int, stop: int) -> Iterator[pa.RecordBatch]:
    """Yield the ground truth of items ``start`` to ``stop``, as batches of ``tables.TRUTH``."""
    plan = catalog(params, seed)
    for _, first, last in _blocks(start, stop):
        columns = [
            _ids("i", np.arange(first, last)),
            plan.topic[first:last],
            plan.expected_count(first, last),
            plan.noise_norm(first, last).astype(np.float32),
        ]
        yield pa.RecordBatch.from_arrays([pa.array(column) for column in columns], schema=tables.TRUTH)


def interactions(params: Synthetic, seed: int, start: int, stop: int) -> Iterator[pa.RecordBatch]:
    """Yield events of users ``start`` to ``stop`` in time order, as batches of ``tables.INTERACTIONS``; ``pos``,
    ``rating`` and ``label`` are null."""
    plan = catalog(params, seed)
    for block, first, last in _blocks(start, stop):
        begin = block * BLOCK
        user, item, time = _events(plan, block, min(BLOCK, params.users - begin))
        rows = slice(*np.searchsorted(user, [first - begin, last - begin]))
        columns = [_ids("u", begin + user[rows]), _ids("i", item[rows]), pc.cast(pa.array(time[rows]), pa.string())]
        nulls = [pa.nulls(len(columns[0]), tables.INTERACTIONS.field(name).type) for name in ("pos", "rating", "label")]
        yield pa.RecordBatch.from_arrays([*columns, *nulls], schema=tables.INTERACTIONS)


def _blocks(start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    for block in range(start // BLOCK, -(-stop // BLOCK)):
        yield block, max(start, block * BLOCK), min(stop, (block + 1) * BLOCK)


def _vectors(
    plan: Catalog, modality: str, centre: NDArray[np.float32], block: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    count, width = centre.shape
    noise = plan.generator(modality, block).standard_normal((count, width), np.float32)
    if modality == tables.BEHAVIOR:
        begin = block * BLOCK
        radius, scale = plan.noise_norm(begin, begin + count), np.log1p(plan.expected_count(begin, begin + count))
        return (scale[:, None] * (centre + radius[:, None] * _unit(noise))).astype(np.float32), np.ones(count, bool)
    missing = plan.params.missing_visual if modality == "visual" else 0.0
    present = np.greater_equal(plan.generator(f"{modality} missing", block).random(count), missing)
    noise *= np.float32(plan.params.content_noise / np.sqrt(width))
    twins = np.flatnonzero(plan.twin[block * BLOCK : block * BLOCK + count])
    noise[twins] = noise[twins - 1] + np.float32(APART) * noise[twins]
    return centre + noise, present


def _events(plan: Catalog, block: int, users: int) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]]:
    """Return user within the block, item and unix second of every event of a block, by user and time."""
    rng = plan.generator("users", block)
    beyond = plan.params.interactions / plan.params.users - MIN_LENGTH
    lengths = MIN_LENGTH + rng.poisson(beyond * np.exp(SPREAD * rng.standard_normal(users) - SPREAD**2 / 2))
    interests = plan.topic[plan.pick(rng.random((users, INTERESTS)))]
    ends = np.cumsum(lengths)
    user = np.repeat(np.arange(users), lengths)
    position = np.arange(ends[-1]) - (ends - lengths)[user]
    chosen = np.where(
        rng.random(len(user)) < IN_PHASE, position * INTERESTS // lengths[user], rng.integers(0, INTERESTS, len(user))
    )
    topic = np.where(rng.random(len(user)) < POPULAR, np.int32(-1), interests[user, chosen])
    item = plan.pick(rng.random(len(user)), topic)
    gaps = rng.exponential(size=len(user))
    elapsed = np.cumsum(gaps)
    elapsed -= (elapsed - gaps)[ends - lengths][user]
    share = elapsed / elapsed[ends - 1][user]
    span = DAY * np.minimum(lengths, LONGEST_SPAN)
    # Adding the position makes the times of a user strictly increasing after rounding.
    time = BASE_TIME + rng.integers(0, STARTS * DAY, users)[user] + (share * span[user]).astype(np.int64) + position
    return user, item, time


def _unit(values: NDArray[np.float32]) -> NDArray[np.float32]:
    norms: NDArray[np.float32] = np.linalg.norm(values, axis=1, keepdims=True)
    return values / norms


def _ids(prefix: str, numbers: NDArray[np.integer]) -> pa.Array:
    return pc.binary_join_element_wise(prefix, pc.utf8_lpad(pc.cast(pa.array(numbers), pa.string()), 7, "0"), "")


def _titles(topic: NDArray[np.int32], first: int) -> pa.Array:
    number = pc.cast(pa.array(np.arange(first, first + len(topic))), pa.string())
    return pc.binary_join_element_wise("topic ", pc.cast(pa.array(topic), pa.string()), " item ", number, "")
