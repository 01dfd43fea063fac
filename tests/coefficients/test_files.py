"""Coefficients by name keep every bit, and every change is noticed."""

from __future__ import annotations

import json
import random

import pytest

from adaptive_merge.coefficients.files import load_coefficients, save_coefficients
from adaptive_merge.errors import InputError, MissingFileError
from adaptive_merge.weights.open_clip_names import parameter_names

TASKS = ["SUN397", "Cars", "../../x", "ünï", "__metadata__"]
SUFFIXES = [".safetensors", ".json"]


@pytest.fixture
def coefficients():
    generator = random.Random(0)
    return {task: {name: generator.gauss(0.3, 0.2) for name in parameter_names(2)} for task in TASKS}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_saved_is_loaded_bit_for_bit_and_in_order(tmp_path, coefficients, suffix):
    path = tmp_path / f"deep/coefficients{suffix}"
    save_coefficients(path, coefficients, notes={"recipe": "adamerging"})
    found = load_coefficients(path)
    assert found == coefficients
    assert [list(row) for row in (found, found["Cars"])] == [TASKS, parameter_names(2)]
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_thousand_mutations_are_all_noticed(tmp_path, coefficients, suffix):
    path, generator = tmp_path / f"coefficients{suffix}", random.Random(1)
    save_coefficients(path, coefficients)
    content = path.read_bytes()
    for _ in range(1000):
        damaged = bytearray(content)
        place = generator.randrange(len(content))
        match generator.randrange(4):
            case 0:
                damaged[place] ^= 1 << generator.randrange(8)
            case 1:
                del damaged[place:]
            case 2:
                damaged[place:place] = bytes([generator.randrange(256)])
            case 3:
                damaged[:200] = damaged[:200].replace(b"0", b"1", 1)
        path.write_bytes(damaged)
        if damaged != content:
            with pytest.raises(InputError, match="coefficients"):
                load_coefficients(path)


def test_an_edit_by_hand_is_noticed_and_said(tmp_path):
    save_coefficients(tmp_path / "c.json", {"MNIST": {"proj": 0.25}})
    (tmp_path / "c.json").write_text((tmp_path / "c.json").read_text().replace("0.25", "0.35"))
    with pytest.raises(InputError, match="c.json`: its digest does not fit its content"):
        load_coefficients(tmp_path / "c.json")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({}, "at least one task"),
        ({"a": {}}, "at least one task"),
        ({"a": {"x": 1.0}, "b": {"y": 1.0}}, "task 'b' has other parameter names"),
        ({"a": {"x": float("nan")}}, "task 'a', parameter `x`: expected a number, found nan"),
    ],
)
def test_coefficients_that_make_no_sense_are_not_saved(tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        save_coefficients(tmp_path / "c.json", rows)
    assert not (tmp_path / "c.json").exists()


def test_files_that_are_not_ours_are_refused(tmp_path):
    with pytest.raises(MissingFileError):
        load_coefficients(tmp_path / "none.json")
    (tmp_path / "other.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(InputError, match="other.json`: it has no digest"):
        load_coefficients(tmp_path / "other.json")
    with pytest.raises(InputError, match="ends in .safetensors or .json, found '.yaml'"):
        save_coefficients(tmp_path / "c.yaml", {"a": {"x": 1.0}})
