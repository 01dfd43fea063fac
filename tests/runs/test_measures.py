"""Normalised accuracy by both definitions, and improvement, against numbers taken by hand."""

from __future__ import annotations

import pytest

from adaptive_merge.runs.measures import improvement, measures, normalised

ROWS = {
    "easy": {"n": 10, "pretrained": 0.4, "individual": 1.0, "initial": 0.7, "adapted": 0.9},
    "hard": {"n": 10, "pretrained": 0.1, "individual": 0.5, "initial": 0.05, "adapted": 0.4},
}


def test_the_two_definitions_differ():
    assert normalised(ROWS, "adapted") == pytest.approx({"mean_of_ratios": 0.85, "ratio_of_means": 1.3 / 1.5})
    assert normalised(ROWS, "individual") == {"mean_of_ratios": 1.0, "ratio_of_means": 1.0}


def test_improvement_is_zero_at_the_pre_trained_model_and_one_at_the_expert():
    assert improvement(ROWS, "adapted") == pytest.approx({"easy": 5 / 6, "hard": 0.75})
    assert improvement(ROWS, "initial")["hard"] == pytest.approx(-0.125)
    assert set(improvement(ROWS, "pretrained").values()) == {0.0} and set(improvement(ROWS, "individual").values()) == {
        1.0
    }


def test_what_cannot_be_divided_is_none():
    useless = ROWS | {"none": {"pretrained": 0.2, "individual": 0.0, "initial": 0.1, "adapted": 0.1}}
    assert normalised(useless, "adapted")["mean_of_ratios"] is None
    assert normalised(useless, "adapted")["ratio_of_means"] == pytest.approx(1.4 / 1.5)
    assert improvement(useless, "adapted")["none"] is None
    assert measures({}) == {"normalised": {}, "nai": {}}
    assert set(measures(ROWS)["nai"]) == {"initial", "adapted"}
