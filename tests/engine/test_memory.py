"""What a step's activations take, and the way that `accumulate: auto` goes because of it."""

from __future__ import annotations

import gc

import pytest
import torch
from fitting import fit
from torch import nn

import adaptive_merge as am
from adaptive_merge.engine import memory
from adaptive_merge.engine.step import Step


def test_activations_are_counted_once_and_without_weights(toy, bank):
    backbone = am.MergedBackbone(toy, bank, am.LayerWise())
    one, four = (memory.activation_bytes(backbone, torch.randn(images, 3, 4, 4)) for images in (1, 4))
    assert four == 4 * one and one > 48 * 4
    assert not bank.pretrained.requires_grad


def alive():
    """Tensors that anything still holds."""
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.fixture
def squashed(toy):
    """The toy with an activation whose backward needs its output, as attention's does."""
    toy.blocks[0][2] = nn.Tanh()
    return toy


def test_counting_activations_keeps_none(squashed, bank):
    backbone, images = am.MergedBackbone(squashed, bank, am.LayerWise()), torch.randn(1, 3, 4, 4)
    before = alive()
    memory.activation_bytes(backbone, images)
    assert alive() == before


def test_runs_in_one_process_leave_nothing_behind(squashed, bank, heads, images):
    left = []
    for _ in range(3):
        fit(am.AdaMerging(bank, squashed, heads), images, steps=2)
        left.append(alive())
    assert left[1] == left[2]


def test_a_machine_has_memory():
    assert 1 << 28 < memory.memory_bytes(torch.device("cpu")) < 1 << 50


@pytest.mark.parametrize(("available", "joint"), [(1 << 40, True), (1 << 10, False)])
def test_auto_is_joint_where_activations_are_small(toy, bank, heads, images, monkeypatch, available, joint):
    monkeypatch.setattr(memory, "memory_bytes", lambda device: available)
    ways = []
    for way in ("joint", "per_task"):
        monkeypatch.setattr(Step, way, _noted(getattr(Step, way), ways))
    fit(am.AdaMerging(bank, toy, heads), images, steps=3)
    assert set(ways) == {"joint" if joint else "per_task"}


def test_both_ways_learn_the_same(toy, bank, heads, images):
    joint, apart = (
        fit(am.AdaMerging(bank, toy, heads, accumulate=way), images, steps=5) for way in ("joint", "per_task")
    )
    torch.testing.assert_close(joint, apart, atol=1e-6, rtol=0)


def _noted(method, ways):
    def call(*args):
        ways.append(method.__name__)
        return method(*args)

    return call
