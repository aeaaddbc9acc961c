"""Read and write YAML 1.2 (core schema): ``1e-3`` is a number, ``no`` is a string, a date is a string, and a duplicate
key is an error."""

from __future__ import annotations

import re
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"
_KINDS = {
    "null": (r"~|null|Null|NULL|", ("~", "n", "N", "")),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "merge": (r"<<", "<"),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's name; none of version 1.1's

    def compose_mapping_node(self, anchor: Any) -> Any:
        node, lines = super().compose_mapping_node(anchor), dict[tuple[str, str], int]()
        for key, _ in node.value if node else ():
            name = (key.tag, str(key.value))
            if name in lines:
                both = f"{lines[name]} and {key.start_mark.line + 1}"
                raise yaml.YAMLError(f"key {key.value!r} stands twice, in lines {both}: remove one of them")
            lines[name] = key.start_mark.line + 1
        return node

    def construct_yaml_int(self, node: Any) -> int:
        text = str(self.construct_scalar(node))
        return int(text[2:], {"0o": 8, "0x": 16}[text[:2]]) if text[:2] in {"0o", "0x"} else int(text)


class _Dumper(yaml.SafeDumper):
    """Quote strings that YAML 1.1 or 1.2 would not read as text."""


for _kind, (_pattern, _first) in _KINDS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _kind, re.compile(f"^({_pattern})$"), list(_first))
_Loader.add_constructor(_TAG + "int", _Loader.construct_yaml_int)


def read(text: str) -> Any:
    """Return the one document in ``text``. Raises yaml.YAMLError."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except (ValueError, RecursionError) as error:
        raise yaml.YAMLError(str(error)) from None
    finally:
        loader.dispose()


def write(data: Any, **options: Any) -> str:
    """Return ``data`` as YAML that :func:`read` parses to the same data; ``options`` of yaml.dump."""
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, **options))
