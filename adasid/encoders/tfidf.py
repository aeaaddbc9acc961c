r"""Encode text by tf-idf of hashed words and a random projection. No model is downloaded.

A text's terms are its words and pairs of adjacent words; in scripts without blanks each character is a word. With
:math:`c_t` the count of term t in a text, :math:`n` documents and :math:`d_t` those with t (scikit-learn's sublinear tf
and smooth idf),

.. math:: v = \sum_t (1 + \ln c_t) \left(\ln \frac{1 + n}{1 + d_t} + 1\right) R_t, \qquad R_t \sim N(0, I / width),

and the vector is :math:`v / \lVert v \rVert`.
"""

from __future__ import annotations

import hashlib
import time
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from adasid import config
from adasid.config.content import TF_IDF
from adasid.data.text import spaced
from adasid.encoders.base import Encoded, Identity, encoded, needed
from adasid.encoders.text import EMPTY_TEXT, clean, reasons_of
from adasid.errors import InputError, first_line
from adasid.faults import wrapped
from adasid.files import Location, local, replacing

ROWS = 2**18
"""Rows that terms are hashed to."""
WIDTH = 256
"""Width of the vectors where ``content.encoders.<modality>.width`` is null."""
FILE = "tf-idf.safetensors"
"""Name of the file with the state."""


class State(NamedTuple):
    """The state of tf-idf. ``frequencies`` [ROWS] int64: documents with a term of that row. ``documents``: their
    number. ``seed``, ``width``: of the projection."""

    frequencies: NDArray[np.int64]
    documents: int
    seed: int
    width: int


def count(texts: pa.Array, max_chars: int) -> NDArray[np.int64]:
    """Return the document frequencies [ROWS] of texts; those of several batches are summed. The number of documents is
    that of all texts that are not null."""
    terms = _terms([text for text in clean(texts, max_chars) if text])
    return np.bincount(terms.indices, minlength=ROWS).astype(np.int64)


def write(folder: Location, frequencies: NDArray[np.int64], documents: int, width: int, seed: int) -> None:
    """Write the state into ``folder``. ``frequencies`` [ROWS]: the sum of :func:`count`."""
    from safetensors.numpy import save_file

    with replacing(folder / FILE) as draft:
        metadata = {"documents": str(documents), "seed": str(seed), "width": str(width)}
        save_file({"frequencies": np.ascontiguousarray(frequencies, np.int64)}, draft, metadata)


def read(key: str, settings: config.Encoder, folder: Location | None) -> State:
    """Read the state from ``folder``. Raises InputError if it is missing, or of another width than ``settings``."""
    from safetensors import safe_open

    if folder is None:
        raise InputError(f"{key}: tf-idf has no folder with its document frequencies: count them first")
    path = folder / FILE
    try:
        with local(path) as copy, safe_open(copy, "numpy") as file:
            facts = file.metadata()
            state = State(
                file.get_tensor("frequencies"), *(int(facts[name]) for name in ("documents", "seed", "width"))
            )
    except FileNotFoundError:
        raise InputError(f"{key}: {path} does not exist: count the document frequencies first") from None
    except Exception as error:
        raise wrapped(
            error, f"{key}: {path} cannot be read ({first_line(error)}): count the document frequencies again"
        ) from error
    if state.width != (settings.width or WIDTH):
        raise InputError(
            f"{key}.width: {settings.width or WIDTH}, but {path} is of width {state.width}: set {state.width}, or "
            "count the document frequencies again"
        )
    return state


def identity(settings: config.Encoder, state: State) -> Identity:
    """Return the identity of the encoder with this state."""
    facts = f"{state.documents} {state.seed} {state.width} ".encode()
    digest = hashlib.sha256(facts + state.frequencies.astype("<i8").tobytes()).hexdigest()
    return {"kind": TF_IDF, "digest": digest, "width": state.width, "max_chars": settings.max_chars}


class TfIdfEncoder:
    """An encoder of text by tf-idf, a random projection and norm 1."""

    def __init__(self, key: str, settings: config.Encoder, fitted: Location | None, device: torch.device) -> None:
        """Read the state from the folder ``fitted`` and draw the projection. Raises InputError as :func:`read` does."""
        needed(key, "sklearn")
        state = read(key, settings, fitted)
        self.width, self.seconds = state.width, 0.0
        self.identity = identity(settings, state)
        self._max_chars = settings.max_chars
        self._idf = np.log((1 + state.documents) / (1 + state.frequencies)) + 1
        generator = torch.Generator().manual_seed(state.seed)
        projection = torch.randn(ROWS, state.width, generator=generator)
        self._projection = projection.mul_(state.width**-0.5).to(device)

    def encode(self, rows: pa.Array) -> Encoded:
        """Encode texts [n]."""
        texts = clean(rows, self._max_chars)
        reasons, given = reasons_of(rows, texts)
        terms = _terms([text for text in texts if text])
        empty = np.diff(terms.indptr) == 0
        for row in given[empty]:
            reasons[row] = EMPTY_TEXT
        weights = (1 + np.log(terms.data)) * self._idf[terms.indices]
        start, device = time.perf_counter(), self._projection.device
        outputs = torch.nn.functional.embedding_bag(
            torch.from_numpy(terms.indices.astype(np.int64)).to(device),
            self._projection,
            torch.from_numpy(terms.indptr[:-1].astype(np.int64)).to(device),
            mode="sum",
            per_sample_weights=torch.from_numpy(weights.astype(np.float32)).to(device),
        ).cpu()
        self.seconds += time.perf_counter() - start
        return encoded(outputs[torch.from_numpy(~empty)], given[~empty], reasons, self.width)


def _terms(texts: list[str]) -> Any:
    """Return the counts of terms, a sparse matrix [n, ROWS] in CSR."""
    counts = _hashing().transform([*spaced(texts), ""])[:-1]  # it refuses an empty list
    counts.sum_duplicates()
    return counts


@cache
def _hashing() -> Any:
    text = needed("tf-idf", "sklearn.feature_extraction.text")
    return text.HashingVectorizer(
        n_features=ROWS,
        tokenizer=str.split,
        token_pattern=None,
        lowercase=False,
        ngram_range=(1, 2),
        norm=None,
        alternate_sign=False,
    )
