"""Test the models of gates and generations: their JSON, and that they are frozen."""

import json

import numpy as np
import pytest
from pydantic import ValidationError

from pipelines.publish.gates import Gate, at_most, failures
from pipelines.publish.generations import Candidate, Generation

GATES = (
    {"gate": "largest group", "value": 3, "threshold": 100, "passed": True},
    {"gate": "lowest utilisation", "value": 0.25, "threshold": 1.0, "passed": False},
    {"gate": "collision rate", "value": None, "threshold": 0.5, "passed": False},
    {"gate": "churn", "value": 1, "threshold": 0.1, "passed": False, "of": "9 items", "overruled": "sids.replace"},
)


def candidate(**changes):
    return Candidate(
        **{
            "generation": 2,
            "policy": "frozen",
            "run_date": "2026-01-02",
            "inputs": {"item_features": 7},
            "tokenizer": "d",
            "artifact": "/a",
            "items": 9,
            "metrics": {"items": 9, "codes": [[1, 2]], "entropy": [None, 0.1]},
            "gates": tuple(Gate(**gate) for gate in GATES),
            "churn": {"by_slot": {}},
            "drift": {"counts": {"text": {"tail": {"bins": [1, 0], "error": 0.5}}}},
            **changes,
        }
    )


@pytest.mark.parametrize("values", GATES, ids=lambda values: values["gate"])
def test_the_json_of_a_gate_has_what_the_gate_has_and_whole_numbers_stay_whole(values):
    assert json.dumps(Gate(**values).model_dump()) == json.dumps(values)
    assert json.dumps(Gate(**json.loads(json.dumps(values))).model_dump()) == json.dumps(values)


def test_a_gate_on_a_metric_over_no_items_passes_and_a_numpy_value_is_a_number():
    assert at_most("churn", None, 0.1).passed and not at_most("churn", np.float64(0.2), 0.1).passed
    assert json.dumps(at_most("churn", np.float64(0.1) + np.float64(0.2), 1).model_dump()) == json.dumps(
        {"gate": "churn", "value": 0.1 + 0.2, "threshold": 1, "passed": True}
    )
    assert failures([at_most("churn", 0.5, 0.1, of="9 items")]) == "churn is 0.5 of 9 items, allowed 0.1"


def test_a_generation_is_the_candidate_with_its_place_and_comes_back_from_its_row():
    generation = Generation(**dict(candidate()), parent=1, sids_version=4, run="shop")
    row = generation.row()
    assert json.loads(row["gates"]) == list(GATES) and row["metrics"] == json.dumps(generation.metrics)
    assert not {"live", "hold"} & set(row)
    parsed = {name: json.loads(row[name]) for name in ("inputs", "gates", "metrics", "drift", "churn")}
    assert Generation(**{**row, **parsed}) == generation and not generation.live and generation.hold is None
    with pytest.raises(ValidationError, match="frozen"):
        generation.live = True
