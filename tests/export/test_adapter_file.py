"""The adapter file: bit-equal, by name, and only onto the experts that it was learned on."""

from __future__ import annotations

import json
import random

import pytest
import torch

import adaptive_merge as am
from adaptive_merge.adapters.heads import CosineHead
from adaptive_merge.export import load_adapters, save_adapters
from adaptive_merge.export.adapter_file import FORMAT
from adaptive_merge.merge.rule import Rule
from adaptive_merge.sealed import load_sealed, save_sealed
from export.export_helpers import build_module, build_tower


def parts():
    return [am.FeatureSurgery(4), am.Tint("head"), am.Tint("proj")]


@pytest.fixture(scope="module")
def adapted():
    return build_module(adapters=parts())


@pytest.fixture
def path(tmp_path, adapted):
    save_adapters(adapted, tmp_path / "adapters.safetensors")
    return tmp_path / "adapters.safetensors"


def blank(**changes):
    module = build_module(**{"adapters": parts()} | changes)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return module


def test_round_trip_is_bit_equal_and_small(path, adapted):
    module = blank()
    load_adapters(module, path)
    wanted = adapted.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in module.state_dict().items())
    assert path.stat().st_size < 120_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 9}, "another expert 'red'"),
        ({"tower": build_tower(layers=3)}, "another pre-trained model"),
        ({"coefficients": am.TaskWise(0.3)}, "another coefficients: 'LayerWise', this module has 'TaskWise'"),
        ({"coefficients": am.LayerWise(0.3, bounds="free")}, "coefficients: bounds: 'clamp', this module has 'free'"),
        ({"adapters": [am.FeatureSurgery(8), am.Tint("head"), am.Tint("proj")]}, "adapter 1: rank: 4, this"),
        ({"adapters": parts()[:2]}, "adapter 3: 'Tint', this module has nothing"),
        ({"transforms": [am.Ties(0.2)]}, "transform 1: nothing"),
    ],
)
def test_what_it_does_not_belong_to_is_refused_and_left_as_it_was(path, changes, message):
    module = blank(**changes)
    with pytest.raises(am.InputError, match=message):
        load_adapters(module, path)
    assert not any(bool(parameter.any()) for parameter in module.parameters())


class Shifted(am.Adapter):
    """A user's own adapter, with a setting of another name than rank or layer."""

    def __init__(self, strength=1.0):
        super().__init__()
        self.strength = strength

    def create(self, backbone, heads):
        self.shift = torch.nn.ParameterList(torch.nn.Parameter(torch.zeros(24)) for _ in self.tasks)

    def features(self, task, features):
        return features + self.strength * self.shift[self.row(task)]


def test_another_setting_of_a_user_s_adapter_is_refused(tmp_path):
    path = tmp_path / "adapters.safetensors"
    save_adapters(build_module(adapters=[Shifted(1.0)]), path)
    load_adapters(blank(adapters=[Shifted(1.0)]), path)
    with pytest.raises(am.InputError, match="another adapter 1: strength: 1.0, this module has 9.0"):
        load_adapters(blank(adapters=[Shifted(9.0)]), path)


def test_how_it_learned_and_its_label_may_differ(path, adapted):
    coefficients = am.LayerWise(0.1, trainable=False)
    module = blank(coefficients=coefficients, recipe="other", lr=0.5, objective=am.Entropy(diversity=1.0))
    load_adapters(module, path)
    assert torch.equal(module.coefficients.values, adapted.coefficients.values)


def test_coefficients_are_kept_by_the_name_of_their_group(path, adapted):
    tensors, metadata = load_sealed(path)
    manifest = json.loads(metadata[FORMAT])
    manifest["groups"].reverse()
    rows = {name: row.flip(0) if name.startswith("coefficients.") else row for name, row in tensors.items()}
    save_sealed(path, rows, metadata | {FORMAT: json.dumps(manifest)})
    module = blank()
    load_adapters(module, path)
    assert torch.equal(module.coefficients.values, adapted.coefficients.values)


class Masked(Rule):
    """A user's own rule: θ₀ + σ(m) ⊙ Σ τ, a mask m with a number per entry."""

    def __init__(self, logit=0.0):
        super().__init__()
        self.logit = logit

    def bind(self, task_vectors):
        self.tasks, self.mask = (
            task_vectors.tasks,
            torch.nn.Parameter(torch.full((task_vectors.layout.numel,), self.logit)),
        )
        self.register_buffer("seen", torch.zeros(2))
        return self

    def state(self):
        return (self.mask.sigmoid(),)

    def combine(self, part, state, out):
        out.copy_(part.bank.pretrained + state[0][part.columns] * part.bank.vectors.sum(0))

    def project(self, part, gradients, state, out):
        raise NotImplementedError


def test_a_rule_of_another_kind_is_kept_whole(tmp_path):
    path = tmp_path / "adapters.safetensors"
    adapted = build_module(coefficients=Masked(), adapters=parts())
    adapted.coefficients.seen.fill_(3)
    save_adapters(adapted, path)
    module = blank(coefficients=Masked())
    load_adapters(module, path)
    assert all(torch.equal(value, adapted.state_dict()[name]) for name, value in module.state_dict().items())
    with pytest.raises(am.InputError, match="another coefficients: logit: 0.0, this module has 1.0"):
        load_adapters(blank(coefficients=Masked(1.0)), path)
    with pytest.raises(am.InputError, match="another coefficients: '.*Masked', this module has 'LayerWise'"):
        load_adapters(blank(), path)


def test_other_heads_are_refused(path):
    module = blank()
    module.model.heads["grey"] = CosineHead(module.model.heads["grey"].weight + 1e-3)
    with pytest.raises(am.InputError, match="head of task 'grey'"):
        load_adapters(module, path)


def test_no_damage_goes_unseen(path):
    module, content, random_ = blank(), path.read_bytes(), random.Random(0)
    for _ in range(100):
        damaged = bytearray(content)
        if random_.random() < 0.3:
            damaged = damaged[: random_.randrange(len(damaged))]
        else:
            damaged[random_.randrange(len(damaged))] ^= 1 << random_.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(am.AdaptiveMergeError):
            load_adapters(module, path)
    with pytest.raises(am.MissingFileError):
        load_adapters(module, path.with_name("gone.safetensors"))


@pytest.mark.parametrize("change", ["manifest", "nan", "shape", "version"])
def test_a_well_sealed_file_of_wrong_content_is_refused(path, change):
    tensors, metadata = load_sealed(path)
    if change == "manifest":
        metadata[FORMAT] = json.dumps({"version": 2, "method": 3})
    elif change == "version":
        metadata[FORMAT] = json.dumps({"version": 3})
    elif change == "nan":
        tensors["coefficients.red"] = tensors["coefficients.red"].fill_(float("nan"))
    else:
        tensors["adapters.0.down.0"] = torch.zeros(1, 24)
    save_sealed(path, tensors, metadata)
    module = blank()
    with pytest.raises(am.InputError, match="adapters.safetensors"):
        load_adapters(module, path)
    assert not any(bool(parameter.any()) for parameter in module.parameters())
