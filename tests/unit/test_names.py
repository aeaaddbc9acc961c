"""Test which names modalities and labels may have."""

import re

import pytest
from torch import nn

from adasid import config
from adasid.config import names
from adasid.errors import ConfigError
from adasid.tokenizers.encode import ENCODED, READ

WORD = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


def test_all_attributes_of_modules_are_known():
    torch = {name.lower() for name in dir(nn.ModuleDict()) if WORD.fullmatch(name)}
    assert torch <= names.MODULE, f"torch has new ones, name them in adasid/config/names.py: {torch - names.MODULE}"


def test_what_stands_beside_the_vectors_is_known():
    assert {*ENCODED.names, *READ, "sampled", "published"} <= names._COLUMNS


@pytest.mark.parametrize(
    ("content", "words"),
    [
        *(
            ([name], f"{name!r} must be ASCII letters")
            for name in ("clip vit", "clip.vit", "1st", "a-b", "", "_x", "é", "a\n", "img(clip)")
        ),
        *(
            ([name], f"{name!r} is a column of")
            for name in ("title", "Title", "norm", "item_id", "richness", "codes", "gauges")
        ),
        *(([name], f"{name!r} is an attribute of") for name in ("items", "keys", "values", "type", "Float", "pop")),
        *(([name], f"{name!r} is not a content modality") for name in ("shared", "behavior", "Behavior")),
        (["text", "Text"], "'Text' is the name of another modality ('text'"),
        (["text", "text"], "'text' is the name of another modality"),
    ],
)
def test_a_modality_that_a_table_or_a_module_cannot_take_is_named_with_the_fix(content, words):
    with pytest.raises(ConfigError) as error:
        config.build({"features": {"content": content}, "tokenizer": {"name": "random"}})
    message = str(error.value)
    assert (
        words in message and "give the column another name in the source" in message and len(message.splitlines()) == 1
    )


@pytest.mark.parametrize("content", [["text", "visual"], ["clip_vit_L14"], ["no", "on"], ["x"], ["item"]])
def test_other_names_are_taken(content):
    assert config.build({"features": {"content": content}}).tokenizer.content == tuple(content)


@pytest.mark.parametrize("label", ["", "  ", "a\nb", "a\tb", "\x00", "a\u2028b"])
@pytest.mark.parametrize("kind", ["retrievers", "rankers", "controls", "ranking_controls", "tokenizers"])
def test_a_label_is_one_line(kind, label):
    section = {"compare": {kind: {label: {}}}} if kind == "tokenizers" else {"evaluate": {kind: {label: {}}}}
    with pytest.raises(ConfigError, match=re.escape(f"{kind}: {label!r} is not one line")):
        config.build(section)
