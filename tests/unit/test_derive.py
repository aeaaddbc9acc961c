"""Test config sections that name another as their base."""

import re

import pytest

from adasid import config
from adasid.errors import ConfigError
from tests.unit.test_config import CONF


def compared(sections, **rest):
    return config.build({"compare": {"tokenizers": sections}, **rest}).compare.tokenizers


BASE = {
    "name": "adc-sid",
    "content_experts": {"text": 2, "visual": 1},
    "router": {"sparsity": 0.2, "hidden": 32},
    "hidden": [64, 32],
}


@pytest.mark.parametrize(
    ("given", "written_out"),
    [
        ({}, BASE),
        ({"name": "adc-sid"}, BASE),
        ({"behavior_experts": 5}, {**BASE, "behavior_experts": 5}),
        ({"hidden": [16]}, {**BASE, "hidden": [16]}),
        ({"router": {"gate": "equal"}}, {**BASE, "router": {"sparsity": 0.2, "hidden": 32, "gate": "equal"}}),
        ({"router": {"sparsity": None}}, {**BASE, "router": {"sparsity": None, "hidden": 32}}),
        ({"controller": {"enabled": False}}, {**BASE, "controller": {"enabled": False}}),
        ({"content_experts": {"visual": 3}}, {**BASE, "content_experts": {"visual": 3}}),
        ({"contrast": {}}, {**BASE, "contrast": {}}),
    ],
)
def test_a_section_is_its_base_with_other_values(given, written_out):
    result = compared({"base": BASE, "other": {"like": "base", **given}})["other"]
    assert config.digest(result) == config.digest(compared({"other": written_out})["other"])
    assert result.model_dump() == compared({"other": written_out})["other"].model_dump()


def test_a_chain_in_any_order_and_the_defaults_of_the_method():
    result = compared(
        {
            "c": {"like": "b", "router": {"hidden": 8}},
            "b": {"like": "a", "router": {"gate": "equal"}},
            "a": {"name": "ada-sid"},
        }
    )
    assert list(result) == ["c", "b", "a"] and result["c"].name == "ada-sid"
    assert (result["c"].router.gate, result["c"].router.hidden, result["c"].router.sparsity) == ("equal", 8, 0.4)
    assert (result["b"].router.gate, result["b"].router.hidden) == ("equal", 64)
    assert result["a"].router.gate == "dynamic"


def test_a_base_without_a_name_is_the_default_tokenizer():
    result = compared({"a": {"behavior_experts": 2}, "b": {"like": "a", "router": {"hidden": 8}}})
    assert (result["b"].name, result["b"].behavior_experts, result["b"].router.hidden) == ("adc-sid", 2, 8)


def test_a_section_of_another_kind_and_a_null_replace():
    result = compared(
        {
            "a": {"name": "quasid", "repulsion": {"full_margin": 0.7, "radius": 1}},
            "same kind": {"like": "a", "repulsion": {"kind": "hamr", "radius": 2}},
            "no kind": {"like": "a", "repulsion": {"radius": 2}},
            "other kind": {"like": "a", "repulsion": {"kind": "adaptive", "margin": 1.5}},
            "null": {"like": "a", "repulsion": None, "contrast": None},
            "and back": {"like": "null", "repulsion": {"kind": "hamr", "radius": 3}},
            "levels": {"name": "rq-kmeans", "levels": {"text": 2, "behavior": 1}},
            "fewer": {"like": "levels", "levels": {"text": 3}},
            "aligned": {"name": "rq-kmeans", "aligner": {"width": 8, "training": {"epochs": 9, "batch": 64}}},
            "short": {"like": "aligned", "aligner": {"training": {"epochs": 5}}},
        }
    )
    assert (result["same kind"].repulsion.full_margin, result["same kind"].repulsion.radius) == (0.7, 2)
    assert result["no kind"] == result["same kind"]
    assert (result["other kind"].repulsion.kind, result["other kind"].repulsion.margin) == ("adaptive", 1.5)
    assert result["null"].repulsion is None and result["null"].contrast is None
    assert (result["and back"].repulsion.full_margin, result["and back"].repulsion.radius) == (0.8, 3)
    assert result["fewer"].levels == {"text": 3}
    assert (result["short"].aligner.width, result["short"].aligner.training.epochs) == (8, 5)
    assert result["short"].aligner.training.batch == 64


def test_what_is_evaluated_derives_in_the_same_way():
    result = config.build(
        {
            "evaluate": {
                "retrievers": {"a": {"dropout": 0.4}, "b": {"like": "a", "head": "parallel"}},
                "rankers": {"x": {"width": 16}, "y": {"like": "x", "hidden": [8]}},
                "controls": {"s": {"width": 32}, "t": {"like": "s", "heads": 2}},
                "ranking_controls": {"i": {"lr": 0.01}, "j": {"like": "i", "epochs": 3}},
            }
        }
    ).evaluate
    assert (result.retrievers["b"].head, result.retrievers["b"].dropout) == ("parallel", 0.4)
    assert (result.rankers["y"].width, result.rankers["y"].hidden) == (16, (8,))
    assert (result.controls["t"].width, result.controls["t"].heads) == (32, 2)
    assert (result.ranking_controls["j"].lr, result.ranking_controls["j"].epochs) == (0.01, 3)


def test_an_override_of_the_base_reaches_what_derives_from_it():
    cfg = config.load(CONF / "beauty.yaml", ["compare.tokenizers.adc-sid.behavior_experts=4"])
    experts = {label: getattr(settings, "behavior_experts", 0) for label, settings in cfg.compare.tokenizers.items()}
    assert experts["adc-sid"] == experts["adc-sid, no alignment"] == 4
    assert experts["adc-sid, as published"] == 3 and experts["ada-sid"] == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"compare": {"tokenizers": {"adc-sid": {}, "b": {"like": "adcsid"}}}},
            "compare.tokenizers.b.like is 'adcsid', which is not a label of compare.tokenizers; did you mean 'adc-sid'",
        ),
        ({"compare": {"tokenizers": {"b": {"like": 3}}}}, "compare.tokenizers.b.like is 3, which is not a label of"),
        ({"compare": {"tokenizers": {"b": {"like": None}}}}, "compare.tokenizers.b.like is None, which is not a label"),
        (
            {"compare": {"tokenizers": {"a": {"like": "b"}, "b": {"like": "c"}, "c": {"like": "b"}}}},
            "compare.tokenizers.c.like is 'b': 'b' -> 'c' -> 'b' is a cycle; write one of them out, without like",
        ),
        ({"compare": {"tokenizers": {"a": {"like": "a"}}}}, "compare.tokenizers.a.like is 'a': 'a' -> 'a' is a cycle"),
        (
            {"compare": {"tokenizers": {"a": {}, "b": {"like": "a", "name": "rq-vae"}}}},
            "compare.tokenizers.b.name is 'rq-vae' but it is like 'a', whose name is 'adc-sid': remove name",
        ),
        (
            {"compare": {"tokenizers": {"a": {}, "b": {"like": "a", "router": {"gat": "equal"}}}}},
            "unknown key 'compare.tokenizers.b.router.gat'; did you mean 'compare.tokenizers.b.router.gate'?",
        ),
        ({"compare": {"tokenizers": {"a": None, "b": {"like": "a"}}}}, "tokenizers.b.like is 'a', which is None"),
        (
            {"evaluate": {"retrievers": {"item": {}, "b": {"like": "itm"}}}},
            "evaluate.retrievers.b.like is 'itm', which is not a label of evaluate.retrievers; did you mean 'item'?",
        ),
        ({"tokenizer": {"like": "adc-sid"}}, "unknown key 'tokenizer.like'"),
        ({"compare": {"tokenizers": {"a": {"name": ["x"]}}}}, "compare.tokenizers.a.name is"),
    ],
)
def test_a_base_that_cannot_be_is_named_with_the_fix(settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        config.build(settings)
    assert "\n" not in str(error.value)
