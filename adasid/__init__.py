"""Fit a tokenizer on embeddings, encode items to semantic IDs, save and load the tokenizer, and measure the codes.

Importing ``adasid`` loads neither torch nor NumPy; each name below is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adasid import errors
    from adasid.api.encoding import SemanticIds, SidTokenizer
    from adasid.api.evaluation import CodeMetrics, evaluate_codes
    from adasid.api.fitting import fit
    from adasid.api.loading import load

__all__ = ["CodeMetrics", "SemanticIds", "SidTokenizer", "errors", "evaluate_codes", "fit", "load"]

_MODULES = {
    "CodeMetrics": "adasid.api.evaluation",
    "SemanticIds": "adasid.api.encoding",
    "SidTokenizer": "adasid.api.encoding",
    "evaluate_codes": "adasid.api.evaluation",
    "fit": "adasid.api.fitting",
    "load": "adasid.api.loading",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name == "errors":
        return import_module("adasid.errors")
    if name not in _MODULES:
        raise AttributeError(f"module 'adasid' has no attribute {name!r}; its public names are {', '.join(__all__)}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, including those not imported yet."""
    return sorted({*globals(), *__all__})
