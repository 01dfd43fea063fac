"""The line that a run opens its table with: what was gained by what."""

from __future__ import annotations

import pytest

from adaptive_merge.runs.shown import gains

AVERAGE = {"pretrained": 0.66, "individual": 0.941, "initial": 0.896, "adapted": 0.908}


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"anchor": 0.713}, "71.3 % merged, +18.3 by the start, +1.2 by adaptation: 90.8 %, the experts 94.1 %"),
        ({}, "89.6 % merged, +1.2 by adaptation: 90.8 %, the experts 94.1 %"),
        ({"adapted": 0.88}, "89.6 % merged, -1.6 by adaptation: 88.0 %, the experts 94.1 %"),
    ],
)
def test_each_part_has_its_gain(changed, line):
    assert gains({"average": AVERAGE | changed, "steps": 10}) == line


def test_a_start_alone_and_a_static_merge():
    alone = AVERAGE | {"anchor": 0.713, "adapted": 0.896}
    assert gains({"average": alone, "steps": 0}) == "71.3 % merged, +18.3 by the start: 89.6 %, the experts 94.1 %"
    assert gains({"average": AVERAGE, "steps": 0}) == ""
    assert gains({"average": AVERAGE, "steps": 10, "measure": "agreement"}) == ""
