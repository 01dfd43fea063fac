"""Locked experts are warned of where a suite is loaded, and clean ones are not."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch
from conftest import TASKS, perturbed, write_manifest
from safetensors.torch import load_file, save_file

import adaptive_merge as am
from adaptive_merge.merge.signature import locked_experts, warn_of_locks
from adaptive_merge.suites.embedded_tower import build_encoder

HEADS = 4


def locked(state, blocks=(0, 1, 2, 3), seed=5):
    """MergeLock's QK half: in each head, queries times A and keys times A⁻ᵀ, which leaves all products as they are."""
    generator, state = torch.Generator().manual_seed(seed), dict(state)
    for block in blocks:
        for kind in ("weight", "bias"):
            name = f"transformer.resblocks.{block}.attn.in_proj_{kind}"
            state[name] = state[name].clone()
        for head in range(HEADS):
            size = 128 // HEADS
            u, v = (torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0] for _ in "ab")
            turn = u @ torch.diag(0.5 + 1.5 * torch.rand(size, generator=generator, dtype=torch.float64)) @ v
            for matrix, part in ((turn, 0), (torch.linalg.inv(turn).T, 1)):
                rows = slice(128 * part + size * head, 128 * part + size * (head + 1))
                for kind in ("weight", "bias"):
                    values = state[f"transformer.resblocks.{block}.attn.in_proj_{kind}"]
                    values[rows] = (matrix @ values[rows].double()).float()
    return state


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(0)
    encoder = build_encoder().eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return encoder


def bank_of(tower, **experts):
    return am.TaskVectors.from_state_dicts(tower.state_dict(), experts)


def test_a_locked_tower_computes_the_same_and_is_named(tower):
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    clean = perturbed(tower.state_dict(), 1, 0.003)
    hidden = locked(clean)
    outputs = [torch.func.functional_call(tower, state, (images,)) for state in (clean, hidden)]
    assert torch.allclose(*outputs, atol=1e-4)
    partly = locked(clean, blocks=(2,))
    found = locked_experts(bank_of(tower, clean=clean, hidden=hidden, partly=partly))
    assert [one.task for one in found] == ["hidden", "partly"]
    base = tower.state_dict()["transformer.resblocks.2.attn.in_proj_weight"].double().view(3, -1)
    moved = (partly["transformer.resblocks.2.attn.in_proj_weight"].double().view(3, -1) - base).norm(dim=1)
    assert found[1].name == "transformer.resblocks.2.attn.in_proj_weight"
    assert found[1].ratio == pytest.approx(float((moved / base.norm(dim=1))[:2].max()), rel=1e-4)
    assert all(one.cosine < 0.5 < one.ratio and one.mlp < 0.2 for one in found)


@pytest.mark.parametrize("scale", [0.001, 0.02, 0.3])
def test_noise_is_no_lock_however_loud(tower, scale):
    assert locked_experts(bank_of(tower, one=perturbed(tower.state_dict(), 3, scale))) == []


def test_experts_of_the_embedded_suite_and_of_attention_alone_are_clean(tower):
    assert locked_experts(am.load_suite(lazy=True).task_vectors) == []
    state = tower.state_dict()
    attention = {
        name: 1.3 * value + 0.02 * torch.randn_like(value) if "attn" in name else value for name, value in state.items()
    }
    assert locked_experts(bank_of(tower, attention=attention, same=state)) == []


def test_towers_without_attention_or_blocks_have_nothing_to_compare(bank, caplog):
    with caplog.at_level(logging.WARNING):
        warn_of_locks(bank)
    assert not caplog.records


def test_a_suite_with_a_locked_expert_warns_at_load(suite_folder, tmp_path, caplog):
    folder = shutil.copytree(suite_folder, tmp_path / "suite")
    with caplog.at_level(logging.WARNING):
        am.load_suite(str(folder))
    assert not caplog.records
    path = folder / "experts" / f"{list(TASKS)[1]}.safetensors"
    save_file(locked(load_file(path)), path)
    write_manifest(folder)
    with caplog.at_level(logging.WARNING):
        am.load_suite(str(folder))
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["expert 'green'"]
    assert "MergeLock" in caplog.text
