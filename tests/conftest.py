"""Shared fixtures: a toy backbone with experts, and a small suite folder on disk."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import adaptive_merge as am
from adaptive_merge.suites.embedded_tower import build_encoder

torch.set_num_threads(1)
TASKS = {"red": 3, "green": 5, "blue": 2}


def pytest_addoption(parser):
    parser.addoption("--fuzz-seed", type=int, default=0, help="of `-m fuzz`: which mutated files there are")
    parser.addoption("--fuzz-minutes", type=float, default=10.0, help="of `-m fuzz`: how long it goes on")
    parser.addoption("--fuzz-inputs", type=int, default=10**9, help="of `-m fuzz`: how many files at most")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


class Toy(nn.Module):
    """Two blocks between a stem and a projection: images [B, 3, 4, 4] → features [B, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(48, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()) for _ in range(2))
        self.proj = nn.Parameter(torch.randn(8, 6) / 3)
        self.image_mean, self.image_std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.stem(images.flatten(1))
        for block in self.blocks:
            x = x + block(x)
        return x @ self.proj


def perturbed(state: dict[str, torch.Tensor], seed: int, scale: float = 0.2) -> dict[str, torch.Tensor]:
    """A fake expert: every tensor moved at random."""
    generator = torch.Generator().manual_seed(seed)
    return {name: value + scale * torch.randn(value.shape, generator=generator) for name, value in state.items()}


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


@pytest.fixture
def experts(toy) -> dict[str, dict[str, torch.Tensor]]:
    return {task: perturbed(toy.state_dict(), seed) for seed, task in enumerate(TASKS)}


@pytest.fixture
def bank(toy, experts) -> am.TaskVectors:
    return am.TaskVectors.from_state_dicts(toy.state_dict(), experts)


@pytest.fixture
def heads() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        task: 16 * nn.functional.normalize(torch.randn(classes, 6, generator=generator), dim=-1)
        for task, classes in TASKS.items()
    }


@pytest.fixture
def images() -> dict[str, am.Images]:
    generator = torch.Generator().manual_seed(11)
    return {
        task: am.Images(
            torch.randint(0, 256, (20 + 3 * classes, 4, 4, 3), generator=generator, dtype=torch.uint8),
            torch.randint(0, classes, (20 + 3 * classes,), generator=generator),
            [f"{task} {c}" for c in range(classes)],
        )
        for task, classes in TASKS.items()
    }


@pytest.fixture(scope="session")
def suite_folder(tmp_path_factory):
    """A folder laid out like the embedded suite: the true encoder, random experts, 24 images a task."""
    return write_suite(tmp_path_factory.mktemp("suite"))


def write_suite(folder):
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    state = build_encoder().state_dict()
    (folder / "experts").mkdir()
    (folder / "images").mkdir()
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "pretrained.safetensors")
    heads = {}
    for seed, (task, classes) in enumerate(TASKS.items()):
        save_file(perturbed(state, seed, 0.01), folder / "experts" / f"{task}.safetensors")
        heads[f"{task}.weight"] = 16 * nn.functional.normalize(torch.randn(classes, 128), dim=-1)
        arrays = {
            "test_images": generator.integers(0, 256, (24, 32, 32), dtype=np.uint8),
            "test_labels": generator.integers(0, classes, 24),
        }
        np.savez_compressed(folder / "images" / f"{task}.npz", **arrays)
    save_file(heads, folder / "heads.safetensors")
    write_manifest(folder)
    return folder


def write_manifest(folder) -> None:
    files = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "suite.json"
    }
    manifest = {
        "schema": 1,
        "name": "toy",
        "image_size": 32,
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "tasks": {task: {"classes": [f"{task} {c}" for c in range(classes)]} for task, classes in TASKS.items()},
        "files": files,
    }
    (folder / "suite.json").write_text(json.dumps(manifest))
