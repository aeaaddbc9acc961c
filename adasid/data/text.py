"""Texts by columns: hashes, with which tables are joined by integers; words; bytes that are not UTF-8."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

_JOINERS = r"[\x{200C}\x{200D}]"
_NO_WORD = r"[^\p{L}\p{M}\p{N}%s]+"
_UNSPACED = r"([\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]\p{M}*)"
_OFFSET, _PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)


def hashed_text(column: pa.StringArray, salt: int = 0) -> NDArray[np.uint64]:
    """Return the hash of each text [n] without nulls: FNV-1a with 64 bits of its bytes in UTF-8, after those of
    ``salt``, one byte, unless it is 0."""
    wide = isinstance(column, pa.LargeStringArray)
    _, offsets, data = column.buffers()
    ends = np.frombuffer(offsets, np.int64 if wide else np.int32)[column.offset : column.offset + len(column) + 1]
    text = np.frombuffer(data, np.uint8) if data else np.zeros(0, np.uint8)
    starts, lengths = ends[:-1].astype(np.int64), np.diff(ends)
    hashes = np.full(len(column), _OFFSET)
    if salt:
        hashes = (hashes ^ np.uint64(salt)) * _PRIME
    order = np.argsort(-lengths, kind="stable")
    hashes, starts, lengths = hashes[order], starts[order], lengths[order]
    for byte in range(int(lengths.max(initial=0))):
        longer = len(lengths) - int(np.searchsorted(lengths[::-1], byte, side="right"))
        hashes[:longer] = (hashes[:longer] ^ text[starts[:longer] + byte]) * _PRIME
    found = np.empty_like(hashes)
    found[order] = hashes
    return found


def is_utf8(texts: pa.Array) -> NDArray[np.bool_]:
    """Return whether the bytes of each text [n] are UTF-8, which Arrow and Parquet do not check; true for null."""
    try:
        texts.validate(full=True)
        return np.ones(len(texts), bool)
    except pa.ArrowInvalid:
        return np.array([text is None or text == _replaced(text).encode() for text in _bytes(texts)], bool)


def readable(texts: pa.Array) -> list[str | None]:
    """Return texts [n]; bytes that are not UTF-8 become U+FFFD."""
    if is_utf8(texts).all():
        return [None if text is None else str(text) for text in texts.to_pylist()]
    return [None if text is None else _replaced(text) for text in _bytes(texts)]


def spaced(texts: list[str], inner: str = "") -> list[str]:
    """Return the words of texts [n] in lower case, with blanks between them; in scripts without blanks each character
    is a word. ``inner``: characters that belong to words besides letters, marks and digits."""
    words = pc.replace_substring_regex(pa.array(texts, pa.large_string()), _JOINERS, "")
    words = pc.replace_substring_regex(pc.utf8_lower(words), _NO_WORD % inner, " ")
    return [str(text) for text in pc.replace_substring_regex(words, _UNSPACED, r" \1 ").to_pylist()]


def _bytes(texts: pa.Array) -> list[bytes | None]:
    found: list[bytes | None] = texts.cast(pa.large_binary()).to_pylist()
    return found


def _replaced(text: bytes) -> str:
    return text.decode("utf-8", "replace")
