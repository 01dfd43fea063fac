"""A pre-trained tower and an expert that do not belong together are told apart before anything is merged."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from adaptive_merge.errors import InputError
from adaptive_merge.weights import Manifest, Weights, check_agreement

FACTS = Manifest(
    width=64,
    layers=2,
    patch=16,
    image_size=32,
    mlp_width=256,
    embed_dim=24,
    heads=2,
    quick_gelu=True,
    projection="present",
    source="zeroshot.pt",
    format="zip module",
    sha256="0" * 64,
    dtype="float32",
)


def weights(tensors, **facts) -> Weights:
    return Weights(dict(tensors), dataclasses.replace(FACTS, **facts))


def without_projection(tower):
    return {name: tensor for name, tensor in tower.items() if name != "proj"}


@pytest.fixture
def expert(tower):
    return {name: tensor + 0.01 for name, tensor in tower.items()}


def test_an_expert_that_fits_comes_back_with_a_trained_projection(tower, expert):
    found = check_agreement(weights(tower), weights(expert, source="finetuned.pt"), name="MNIST")
    assert list(found.tensors) == list(tower)
    assert all(torch.equal(found.tensors[name], expert[name]) for name in expert)
    assert found.manifest.projection == "trained"


def test_an_untouched_projection_stays_present(tower, expert):
    found = check_agreement(weights(tower), weights({**expert, "proj": tower["proj"]}), name="MNIST")
    assert found.manifest.projection == "present"


def test_a_hugging_face_expert_gets_the_pretrained_projection(tower, expert):
    vision_only = weights(without_projection(expert), format="huggingface", embed_dim=None, projection="absent")
    found = check_agreement(weights(tower), vision_only, name="MNIST")
    assert torch.equal(found.tensors["proj"], tower["proj"])
    assert list(found.tensors) == list(tower)
    assert (found.manifest.projection, found.manifest.embed_dim) == ("pretrained", 24)
    assert "task vector is zero" in found.manifest.notes[-1]


def test_a_lost_projection_is_refused_unless_it_is_said_to_be_frozen(tower, expert):
    lost = weights(without_projection(expert), source="lost.pt", embed_dim=None, projection="absent")
    with pytest.raises(
        InputError, match=r"`lost.pt \(task 'DTD'\)`: tensor `proj`: expected shape \(64, 24\), found none"
    ):
        check_agreement(weights(tower), lost, name="DTD")
    found = check_agreement(weights(tower), lost, name="DTD", projection="pretrained")
    assert torch.equal(found.tensors["proj"], tower["proj"])


def test_towers_without_any_projection_agree(tower, expert):
    pair = [weights(without_projection(t), embed_dim=None, projection="absent") for t in (tower, expert)]
    found = check_agreement(*pair, name="MNIST")
    assert (found.manifest.projection, found.manifest.embed_dim) == ("absent", None)


def test_a_base_that_lacks_the_experts_projection_is_refused(tower, expert):
    base = weights(without_projection(tower), embed_dim=None, projection="absent")
    with pytest.raises(InputError, match="`zeroshot.pt`: tensor `proj`: expected, because .* found none"):
        check_agreement(base, weights(expert), name="MNIST")


@pytest.mark.parametrize("side", [0, 1])
def test_an_unknown_activation_is_refused_and_the_message_says_how_to_state_it(tower, expert, side):
    pair = [weights(tower), weights(expert)]
    pair[side] = weights(pair[side].tensors, quick_gelu=None, source="unknown.pt")
    with pytest.raises(InputError, match=r"`unknown.pt`: .*`read_weights\(..., quick_gelu=True\)`"):
        check_agreement(*pair, name="MNIST")


def test_different_activations_are_refused(tower, expert):
    with pytest.raises(
        InputError,
        match="MNIST.*does not fit `zeroshot.pt`: QuickGELU: expected True, found False",
    ):
        check_agreement(weights(tower), weights(expert, quick_gelu=False), name="MNIST")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"patch": 32}, "patch: expected 16, found 32"),
        ({"width": 128, "layers": 3}, "width: expected 64, found 128; layers: expected 2, found 3"),
        ({"heads": 4}, "heads: expected 2, found 4"),
    ],
)
def test_different_architectures_are_refused(tower, expert, facts, message):
    with pytest.raises(InputError, match=message):
        check_agreement(weights(tower), weights(expert, **facts), name="MNIST")


def test_heads_that_one_side_does_not_know_are_no_difference(tower, expert):
    check_agreement(weights(tower), weights(expert, heads=None), name="MNIST")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("ln_pre.bias"), r"finetuned.pt \(task 'MNIST'\)`: 1 tensors missing, first `ln_pre.bias`"),
        (lambda t: t.update(extra=torch.zeros(1)), "first `extra`"),
        (
            lambda t: t.update(proj=t["proj"].t()),
            r"`proj`: expected shape \(64, 24\), found \(24, 64\); it is transposed",
        ),
        (lambda t: t["ln_post.bias"].fill_(torch.nan), "finetuned.pt.*`ln_post.bias`: 64 of 64 numbers are NaN"),
        (lambda t: t["proj"][0].fill_(-torch.inf), "`proj`: 24 of 1536 numbers are NaN or infinite"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tower, expert, change, message):
    change(expert)
    with pytest.raises(InputError, match=message):
        check_agreement(weights(tower), weights(expert, source="finetuned.pt"), name="MNIST")
