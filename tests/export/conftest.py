"""Modules over a small tower of the true architecture, in each of the ways that a task may differ."""

from __future__ import annotations

import pytest
import torch

import adaptive_merge as am
from export.export_helpers import build_module


@pytest.fixture(scope="module")
def module():
    return build_module()


@pytest.fixture(scope="module")
def tinted():
    return build_module(adapters=[am.Tint("proj"), am.Tint("head")])


@pytest.fixture(scope="module")
def operated():
    return build_module(adapters=[am.BlockSurgery(2), am.Tint("head")])


@pytest.fixture(scope="session")
def batch():
    return torch.randint(0, 256, (8, 3, 32, 32), generator=torch.Generator().manual_seed(5)).to(torch.uint8)
