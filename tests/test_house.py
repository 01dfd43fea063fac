"""The plan of the house holds: no circle, as many rooms and floors as agreed."""

import importlib.util
from graphlib import CycleError
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "imports.py"


def plan():
    spec = importlib.util.spec_from_file_location("imports", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rooms_and_floors_are_as_agreed(capsys):
    assert plan().main() == 0
    assert "rooms on" in capsys.readouterr().out


def test_a_circle_is_found():
    with pytest.raises(CycleError):
        plan().floors({"merge": {"data"}, "data": {"files", "merge"}})
