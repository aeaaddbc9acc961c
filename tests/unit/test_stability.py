"""Test drift measures against scipy and closed forms."""

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from adasid.metrics.stability import jensen_shannon, stability_index
from pipelines.publish import drift


def test_jensen_shannon_is_scipys():
    rng = np.random.default_rng(0)
    for _ in range(5):
        p, q = rng.integers(0, 50, (2, 20))
        assert jensen_shannon(p, q) == pytest.approx(jensenshannon(p, q, base=2) ** 2)
    assert jensen_shannon([3, 1], [30, 10]) == pytest.approx(0)
    assert jensen_shannon([1, 0], [0, 5]) == pytest.approx(1)
    assert np.isnan(jensen_shannon([0, 0], [1, 2])) and np.isnan(jensen_shannon([0, 0], [0, 0]))


def test_stability_index_by_hand():
    assert stability_index([0.5, 0.5], [0.25, 0.75]) == pytest.approx(-0.25 * np.log(0.5) + 0.25 * np.log(1.5))
    assert stability_index([0.1] * 10, [0.1] * 10) == 0
    assert np.isnan(stability_index([0.1] * 10, [0.0] * 10)) and np.isnan(stability_index([0.1] * 10, ()))
    assert np.isfinite(stability_index([1, 0], [0, 1])) and stability_index([1, 0], [0, 1]) > 10


def test_drift_of_nothing_is_absent():
    before, after = ({"slots": ["a", "b"], "codes": [[1, 2], last]} for last in ([3, 0], [0, 0]))
    assert drift.usage(before, after) == {"a": 0.0}
    shares = {"text": [0.5, 0.5], "visual": [0.5, 0.5]}
    day = {"shares": {"text": [0.5, 0.5], "visual": [0.0, 0.0]}, "error": {}, "spearman": None}
    assert drift.against({"shares": shares, "error": {}}, day)["norms"] == {"text": 0.0}
