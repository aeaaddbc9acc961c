"""The encoding actors on Ray Data: a part that ends its actor is tried again by the next one, and ends the job with one
line in the end; another run encodes what is left."""

from __future__ import annotations

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from adasid import config, errors
from adasid.config import digest
from adasid.encoders import tfidf
from adasid.encoders.base import identity_of
from pipelines.content import pool

pytest.importorskip("sklearn")
SETTINGS = config.Ray(workers=2, cpus_per_worker=0.5, gpus="never")
ENCODER = config.Encoder(fields=("title",), width=8, batch=4)
PARTS, ROWS = 5, 3


class Mortal(pool.EncodePart):
    """An actor that dies of the texts that a file beside the parts names."""

    def __init__(self, call):
        super().__init__(call)
        encode = self.encoder.encode
        self.encoder.encode = lambda rows: os._exit(1) if self.dies(rows[0].as_py()) else encode(rows)

    def dies(self, text):
        return (self.call.todo / text).exists()


@pytest.fixture
def call(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "EncodePart", Mortal)
    todo, done, fitted = (tmp_path / name for name in ("todo", "done", "fitted"))
    for folder in (todo, done, fitted):
        folder.mkdir()
    texts = [[f"red shoe {part} {row}" for row in range(ROWS)] for part in range(PARTS)]
    for part, raw in enumerate(texts):
        pq.write_table(pa.table({"fingerprint": raw, pool.RAW: raw}), todo / f"{part}.parquet")
    tfidf.write(
        fitted, tfidf.count(pa.array([text for part in texts for text in part]), 100), PARTS * ROWS, width=8, seed=1
    )
    identity = identity_of("content.encoders.text", ENCODER, fitted=fitted, offline=True)
    return pool.Call(
        key="content.encoders.text",
        settings=ENCODER,
        digest=digest({"fields": list(ENCODER.read), **identity}),
        todo=todo,
        done=done,
        fitted=fitted,
        root=None,
        roots=(),
        offline=True,
        threads=1,
        options={},
    )


def test_a_part_that_ends_its_actor_is_tried_again_and_given_up_in_the_end(call):
    (call.todo / "red shoe 3 0").touch()
    with pytest.raises(errors.InputError) as failure:
        list(pool.encode(call, 1, SETTINGS))
    assert "content.encoders.text: 3.parquet ended its actor 3 times" in str(failure.value)
    assert "\n" not in str(failure.value)
    for name in ("red shoe 3 0", "3.parquet.tries"):
        (call.todo / name).unlink()
    *_, last = pool.encode(call, 1, SETTINGS)
    assert 0 < last.items < PARTS * ROWS
    for part in range(PARTS):
        raw, made = (pq.read_table(folder / f"{part}.parquet") for folder in (call.todo, call.done))
        assert made["fingerprint"].equals(raw["fingerprint"]) and made["reason"].null_count == ROWS
        assert {len(vector) for vector in made["vector"].to_pylist()} == {8}
