"""Clean texts, and encode them with a model of sentence-transformers."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt
import torch
from numpy.typing import NDArray

from adasid import config
from adasid.data.text import is_utf8
from adasid.encoders import hub
from adasid.encoders.base import ABSENT, Clock, Encoded, checked_width, encoded, needed
from adasid.errors import InputError, first_line
from adasid.faults import wrapped

EMPTY_TEXT = "empty_text"
"""Reason: the text has markup and blanks only; of tf-idf also: no words."""
NOT_UTF8 = "not_utf8"

_MARKUP = "(?is)" + "|".join(
    (
        r"<script\b[^>]*>.*?(?:</script\s*>|\z)",
        r"<style\b[^>]*>.*?(?:</style\s*>|\z)",
        r"<!--.*?(?:-->|\z)",
        r"""</?[a-z](?:[^<>"']|"[^"<]*"|'[^'<]*')*>""",  # an attribute's value may have a >
        r"</?[a-z][^<>]*>",
        r"<[!?][^<>]*>",
    )
)
_ENTITY = "&(?:#[0-9]+|#[xX][0-9a-fA-F]+|[a-zA-Z][a-zA-Z0-9]*);"
_SOFT_HYPHEN = "\u00ad"
_BLANKS = r"[\s\p{Cc}\p{Z}\x{200B}\x{200E}\x{200F}\x{202A}-\x{202E}\x{2060}-\x{206F}\x{FEFF}\x{FFF9}-\x{FFFB}]+"
"""The joiners U+200C and U+200D remain: Persian and the scripts of India spell with them."""
_INVISIBLE = r"^[\p{Z}\p{Cf}\x{FE00}-\x{FE0F}]*$"


def clean(texts: pa.Array, max_chars: int) -> list[str | None]:
    """Return texts [n] without HTML tags, entities, contents of script and style, control characters and zero-width
    blanks, in Unicode's form NFC, with single blanks, cut to ``max_chars`` characters. None where there is no text or
    only blanks, or its bytes are not UTF-8; an empty text where cleaning leaves nothing. Raises InputError for a column
    that is not text."""
    return [None if text is None else str(text) for text in _clean(texts, max_chars).to_pylist()]


def _clean(texts: pa.Array, max_chars: int) -> pa.Array:
    kind = texts.type
    if not (pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind) or pt.is_null(kind)):
        raise InputError(f"the texts are {kind}: store them as string")
    raw = pc.cast(texts, pa.large_string())
    raw = pc.if_else(pa.array(is_utf8(raw)), raw, pa.scalar(None, raw.type))
    given = pc.invert(pc.equal(pc.utf8_trim_whitespace(raw), ""))
    raw = pc.if_else(given, raw, pa.scalar(None, raw.type))
    raw = _replaced(raw, pc.match_substring_regex(raw, "<[a-zA-Z/!?]|" + _ENTITY), _plain)
    raw = _replaced(raw, pc.invert(pc.string_is_ascii(raw)), _composed)
    raw = pc.utf8_trim_whitespace(pc.replace_substring_regex(raw, _BLANKS, " "))
    raw = pc.utf8_trim_whitespace(pc.utf8_slice_codeunits(raw, 0, max_chars))
    return pc.if_else(pc.match_substring_regex(raw, _INVISIBLE), "", raw)


def _replaced(texts: pa.Array, which: pa.Array, function: Callable[[pa.Array], pa.Array]) -> pa.Array:
    which = pc.fill_null(which, False)
    return pc.replace_with_mask(texts, which, function(texts.filter(which)))


def _plain(texts: pa.Array) -> pa.Array:
    """Remove tags and entities. Sources often escape twice, so that entities hide tags and other entities."""
    for _ in range(2):
        texts = pc.replace_substring_regex(texts, _MARKUP, " ")
        texts = pa.array([html.unescape(text) for text in texts.to_pylist()], pa.large_string())
    return pc.replace_substring_regex(texts, _MARKUP, " ")


def _composed(texts: pa.Array) -> pa.Array:
    """Bring texts to the form NFC (pyarrow's utf8_normalize gives NFD, arrow issue 51225), without soft hyphens."""
    forms = (unicodedata.normalize("NFC", text).replace(_SOFT_HYPHEN, "") for text in texts.to_pylist())
    return pa.array(forms, pa.large_string())


def reasons_of(rows: pa.Array, texts: list[str | None]) -> tuple[list[str | None], NDArray[np.int64]]:
    """Return why texts [n], ``rows`` and cleaned, have no vector, and the places [m] of those that have text."""
    reasons = [ABSENT if text is None else None if text else EMPTY_TEXT for text in texts]
    for row in np.flatnonzero(~is_utf8(rows)):
        reasons[row] = NOT_UTF8
    return reasons, np.array([row for row, reason in enumerate(reasons) if reason is None], np.int64)


class SentenceEncoder:
    """An encoder of text with a model of sentence-transformers, in float32."""

    def __init__(self, key: str, settings: config.Encoder, offline: bool, device: torch.device) -> None:
        """Load the model. Raises InputError as :func:`adasid.encoders.base.open_encoder` does."""
        library = needed(key, "sentence_transformers")
        origin = hub.find(key, settings, offline)
        folder = hub.fetch(key, settings, origin, offline)
        try:
            self._model = library.SentenceTransformer(
                str(folder),
                device=str(device),
                trust_remote_code=False,
                local_files_only=True,
                model_kwargs={"use_safetensors": True, "dtype": torch.float32},
            ).eval()
            width = int(self._model.encode(["a"], show_progress_bar=False).shape[1])
        except Exception as error:
            raise wrapped(
                error,
                f"{key}.model: {settings.model} cannot be loaded with sentence-transformers ({first_line(error)}): "
                "name another model",
            ) from error
        self.width = checked_width(key, settings, width)
        self.identity = hub.identity(settings, origin)
        self._settings, self._clock = settings, Clock(self._model, device)

    @property
    def seconds(self) -> float:
        """Return the time inside the model so far."""
        return self._clock.seconds

    def encode(self, rows: pa.Array) -> Encoded:
        """Encode texts [n]; the model reads those of similar length together."""
        texts = clean(rows, self._settings.max_chars)
        reasons, given = reasons_of(rows, texts)
        if not len(given):
            return Encoded(np.zeros((len(texts), self.width), np.float32), reasons)
        outputs = self._model.encode(
            [texts[row] for row in given],
            prompt=self._settings.prompt,
            batch_size=self._settings.batch,
            show_progress_bar=False,
            convert_to_tensor=True,
        )
        return encoded(outputs, given, reasons, self.width)
