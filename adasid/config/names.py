"""Check names: of modalities, which become column names of item tables and submodule names of PyTorch; of tables in
Spark's catalogue; labels."""

from __future__ import annotations

import re
from collections.abc import Iterable

from adasid import tables

_SCHEMAS = (tables.items(()), tables.item_features(()), tables.BEHAVIOR_EMBEDDINGS, tables.SIDS)
_COLUMNS = {name for schema in _SCHEMAS for name in schema.names} | {"reason", "fault", "sampled", "published"}
"""Reserved column names; the last four are added while items are checked and encoded."""
_ATTRIBUTES = """
    add_module apply bfloat16 buffers call_super_init children clear compile cpu cuda double dump_patches eval
    extra_repr
    float forward get_buffer get_extra_state get_parameter get_submodule half ipu items keys load_state_dict modules
    mtia
    named_buffers named_children named_modules named_parameters parameters pop register_backward_hook register_buffer
    register_forward_hook register_forward_pre_hook register_full_backward_hook register_full_backward_pre_hook
    register_load_state_dict_post_hook register_load_state_dict_pre_hook register_module register_parameter
    register_state_dict_post_hook register_state_dict_pre_hook requires_grad_ set_extra_state set_submodule share_memory
    smart_apply state_dict t_destination to to_empty train training type update values xpu zero_grad
"""
MODULE = frozenset(_ATTRIBUTES.split())
"""Attributes of torch.nn.ModuleDict, in lower case; a test compares them with torch's (``smart_apply`` comes with
transformers)."""


_PART = r"(?:\w+|`(?:[^`]|``)+`)"
_NAME = re.compile(rf"{_PART}(?:\.{_PART}){{0,2}}", re.ASCII)
_SUFFIXES = (".parquet", ".parq", ".pq", ".delta")


def is_table_name(text: str) -> bool:
    """Return whether a text is the name of a table in Spark's catalogue: one to three parts with dots between them,
    quoted by backticks where they have other characters than letters, digits and _. A text with a slash, a colon or
    the suffix of a file is a path."""
    path = "/" in text or ":" in text or text.lower().endswith(_SUFFIXES)
    return not path and _NAME.fullmatch(text) is not None


def table_parts(name: str) -> list[str]:
    """Return the parts of the name of a table, without quotes."""
    parts = re.findall(_PART, name, re.ASCII)
    return [part[1:-1].replace("``", "`") if part.startswith("`") else part for part in parts]


def check_modalities(key: str, names: Iterable[str]) -> None:
    """Raise ValueError for a name that a table or PyTorch cannot take. Spark is case-insensitive."""
    seen: dict[str, str] = {}
    for name in names:
        lower, fault = name.lower(), ""
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
            fault = "must be ASCII letters, digits and _, a letter first"
        elif lower in ("shared", tables.BEHAVIOR):
            fault = "is not a content modality"
        elif lower in _COLUMNS:
            fault = "is a column of the pipeline's own tables"
        elif lower in MODULE:
            fault = "is an attribute of PyTorch modules"
        elif lower in seen:
            fault = f"is the name of another modality ({seen[lower]!r}; case does not tell columns apart)"
        if fault:
            raise ValueError(f"{key}: {name!r} {fault}; give the column another name in the source, and here")
        seen[lower] = name


def check_labels(key: str, labels: Iterable[str]) -> None:
    """Raise ValueError for a label that is not one line of visible text; labels appear in tables, figures and
    MLflow."""
    for label in labels:
        if not label.strip() or not label.isprintable():
            raise ValueError(f"{key}: {label!r} is not one line of printable text; rename it")
