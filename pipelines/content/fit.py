"""Count the words of the catalogue on Spark, for the text encoder that needs no model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from adasid.config import Encoder
from adasid.encoders import tfidf
from adasid.errors import InputError
from adasid.files import Location
from pipelines.content import vectors
from pipelines.engines import spark as engine

_COUNTS = pa.schema([("row", pa.int32()), ("documents", pa.int64())])
_ALL = -1
"""This row has the number of all documents."""


def ensure(items: DataFrame, encoder: Encoder, folder: Location | None, seed: int, note: Callable[[str], None]) -> None:
    """Write the document frequencies of tf-idf to ``folder`` unless they are there: an encoder stays the same when the
    catalogue grows. None: the encoder is a model, which is not fitted."""
    if folder is None or (folder / tfidf.FILE).exists():
        return
    texts = items.select(vectors.text(encoder).alias("text")).filter("trim(text) != ''")

    def count(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        sums, documents = np.zeros(tfidf.ROWS, np.int64), 0
        for batch in batches:
            sums += tfidf.count(batch.column(0), encoder.max_chars)
            documents += batch.num_rows
        rows = np.flatnonzero(sums)
        counts = [np.append(rows, _ALL).astype(np.int32), np.append(sums[rows], documents)]
        yield pa.RecordBatch.from_arrays([pa.array(part) for part in counts], schema=_COUNTS)

    counted = texts.mapInArrow(count, engine.struct(_COUNTS)).groupBy("row").agg(F.sum("documents").alias("documents"))
    found = counted.toArrow()  # at most one row for each row of the hash table
    index, sums = found["row"].to_numpy(), found["documents"].to_numpy()
    frequencies = np.zeros(tfidf.ROWS, np.int64)
    frequencies[index[index >= 0]] = sums[index >= 0]
    documents = int(sums[index == _ALL].sum())
    if not frequencies.any():
        raise InputError(
            f"content.encoders: no item has a text in {', '.join(encoder.fields)}, so that tf-idf has no words to "
            "count: name other fields, or leave the encoder out"
        )
    width = encoder.width or tfidf.WIDTH
    tfidf.write(folder, frequencies, documents, width, seed)
    note(f"tf-idf: counted the words of {documents:,} texts; later runs keep these counts")
