"""Values that mean nothing are refused by name before anything runs, and NaN is neither scored nor agreed with."""

from __future__ import annotations

import json
import math

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

import adaptive_merge as am
from adaptive_merge.callbacks.guard.collapse import Signals, sums
from adaptive_merge.files import save_json, strict_json
from adaptive_merge.objectives.base import Prediction
from adaptive_merge.objectives.functional import undefined
from adaptive_merge.starts.predictions import agreement, mean_agreement

NAN, INF = math.nan, math.inf


class Weighted(am.Entropy):
    """A user's objective, which looks at nothing."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight


SILENT = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": -1}, "`lr` has to be a finite number of at least 0, got -1"),
        ({"lr": INF}, "`lr` .* got inf"),
        ({"lr": NAN}, "`lr` .* got nan"),
        ({"lr": True}, "`lr` .* got True"),
        ({"lr": "1e-3"}, "`lr` .* got '1e-3'"),
        ({"adapter_lr": -1e-9}, "`adapter_lr`"),
        ({"adapter_lr": NAN}, "`adapter_lr`"),
        ({"weight_decay": -0.1}, "`weight_decay`"),
        ({"weight_decay": INF}, "`weight_decay`"),
        ({"betas": (0.9, 1.0)}, r"`betas` .* in \[0, 1\), got 1.0"),
        ({"betas": (-0.1, 0.9)}, "`betas`"),
        ({"betas": (NAN, 0.9)}, "`betas`"),
        ({"coefficients": am.LayerWise(NAN)}, "coefficients: init: nan"),
        ({"coefficients": am.TaskWise(INF)}, "coefficients: init: inf"),
        ({"coefficients": am.TaskWise([0.3, NAN, 0.3])}, "coefficients: init: nan"),
        ({"transforms": [am.LiNeS(b=NAN)]}, "transform 1: b: nan"),
        ({"transforms": [am.DARE(0.1), am.LiNeS(a=INF)]}, "transform 2: a: inf"),
        ({"objective": Weighted(NAN)}, "objective: weight: nan"),
        ({"objective": Weighted(-INF)}, "objective: weight: -inf"),
        ({"stages": [am.Stage(1, "all", am.Entropy()), am.Stage(1, "all", Weighted(NAN))]}, "stage 2: "),
        ({"start": am.FeatCal(extrapolation=NAN), "coefficients": am.LayerWise(bounds="free")}, "start: e"),
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused_by_name(toy, bank, heads, options, message):
    with pytest.raises(am.InputError, match=message):
        am.AdaptiveMerge(bank, toy, heads, **options)


@pytest.mark.parametrize("options", [{"lr": 0}, {"lr": 1}, {"weight_decay": 0}, {"betas": (0, 0.999)}], ids=str)
def test_settings_at_the_bounds_are_taken(toy, bank, heads, options):
    am.AdaptiveMerge(bank, toy, heads, coefficients=am.LayerWise(), **options)


@pytest.mark.parametrize(
    "mean, std",
    [
        ((0.5,) * 3, (0.25, 0.0, 0.25)),
        ((0.5,) * 3, (0.25, NAN, 0.25)),
        ((0.5,) * 3, (0.25, -0.25, 0.25)),
        ((0.5,) * 3, (0.25, INF, 0.25)),
        ((0.5, NAN, 0.5), (0.25,) * 3),
        ((0.5,) * 3, (0.25,) * 2),
        ((0.5,) * 3, None),
        ((0.5,) * 3, ()),
        ((), ()),
        (("a", "b", "c"), (0.25,) * 3),
        (0.5, 0.25),
    ],
)
def test_a_normalisation_that_means_nothing_is_refused(toy, bank, mean, std):
    toy.image_mean, toy.image_std = mean, std
    with pytest.raises(am.InputError, match="backbone.image_mean, backbone.image_std: the (mean|std) of the images is"):
        am.MergedBackbone(toy, bank, am.Fixed())


@pytest.mark.parametrize(
    "labels, message",
    [
        (torch.zeros(4), "integer tensor .* got torch.float32"),
        (torch.full((4,), NAN), "got torch.float32"),
        (torch.zeros(4, dtype=torch.float64), "got torch.float64"),
        (torch.zeros(4, dtype=torch.bfloat16), "got torch.bfloat16"),
        (torch.zeros(4, dtype=torch.bool), "got torch.bool"),
        (torch.zeros(4, dtype=torch.complex64), "got torch.complex64"),
        (torch.zeros(4, 1, dtype=torch.long), r"got shape \(4, 1\); give `labels.flatten\(\)`"),
        (torch.zeros(1, 4, dtype=torch.long), r"`labels.flatten\(\)`"),
        (torch.eye(4, 3, dtype=torch.long), r"such as `labels.argmax\(-1\)`"),
        (torch.tensor(0), "got shape"),
        ([0, 1, 0, 1], "got list"),
        (torch.zeros(3, dtype=torch.long), "4 images but 3 labels"),
        (torch.tensor([0, 1, 2, 3]), "labels lie in"),
        (torch.tensor([0, 1, 2, -1]), "labels lie in"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, message):
    with pytest.raises(am.InputError, match=message):
        am.Images(torch.zeros(4, 2, 2, 3, dtype=torch.uint8), labels, ["a", "b", "c"])


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_integer_are_the_same_classes(kind):
    images = am.Images(torch.zeros(3, 2, 2, dtype=torch.uint8), torch.tensor([0, 2, 1], dtype=kind), ["a", "b", "c"])
    assert images.labels.tolist() == [0, 2, 1] and images.labels.dtype == torch.int64


@pytest.mark.parametrize("kind", [torch.float32, torch.bool, torch.complex64])
def test_labels_of_a_loader_of_ones_own_are_looked_at(toy, bank, heads, images, kind):
    batch = {"task": "red", "image": images["red"].take(torch.arange(4)), "label": torch.ones(4, dtype=kind)}
    module = am.TaskArithmetic(bank, toy, heads)
    with pytest.raises(am.InputError, match=f"labels have to be integers.* got {kind}"):
        module.validation_step(batch, 0)


@pytest.mark.parametrize(
    "shape, kind, message",
    [
        ((4, 3, 8, 8), torch.uint8, r"channels first; give `pixels.movedim\(1, -1\)`"),
        ((4, 1, 8, 8), torch.uint8, "channels first"),
        ((4, 8, 8, 1), torch.uint8, "squeeze"),
        ((4, 8, 8, 4), torch.uint8, "alpha"),
        ((4, 8, 8, 2), torch.uint8, r"\(4, 8, 8, 2\)"),
        ((8, 8), torch.uint8, r"\(8, 8\)"),
        ((4, 8, 8, 3), torch.float32, "undo the scaling"),
        ((4, 3, 8, 8), torch.float32, "undo the scaling"),
        ((4, 8, 8, 3), torch.int64, "torch.int64"),
    ],
)
def test_pixels_are_looked_at_once_at_the_door(shape, kind, message):
    with pytest.raises(am.InputError, match=message):
        am.Images(torch.zeros(shape, dtype=kind), torch.zeros(4, dtype=torch.long), ["a"])


def test_pixels_that_are_no_tensor():
    with pytest.raises(am.InputError, match="got ndarray; torch.from_numpy"):
        am.Images(torch.zeros(4, 2, 2, 3, dtype=torch.uint8).numpy(), torch.zeros(4, dtype=torch.long), ["a"])


@pytest.mark.parametrize("odd", [NAN, INF])
@pytest.mark.parametrize("where", ["expert", "merge"])
def test_logits_that_are_nan_are_never_scored(toy, bank, heads, images, odd, where):
    if where == "expert":  # finite weights whose features overflow
        vectors = bank.vectors.clone()
        vectors[0, bank.layout.slices[bank.names.index("proj")]] = 3e38
        bank, view = bank.with_vectors(vectors), "individual"
    else:
        vectors = bank.vectors.clone()
        vectors[:, 0] = odd
        bank, view = bank.with_vectors(vectors), "(individual|initial|adapted)"
    module = am.TaskArithmetic(bank, toy, heads)
    with pytest.raises(am.InputError, match=f"task 'red', model '{view}': the logits of \\d+ images are NaN or inf"):
        am.score(pl.Trainer(**SILENT), module, am.TaskStream(images))


ROWS = torch.tensor([[NAN, 0.0, 1], [INF, 0, 1], [-INF] * 3, [NAN] * 3, [INF] * 3, [-INF, 0, 1], [0, 3e38, -3e38]])


def test_what_predicts_nothing():
    assert undefined(ROWS).tolist() == [True] * 5 + [False] * 2


def test_nothing_agrees_with_nan():
    """argmax of NaN is a class: two models without a word would agree on everything."""
    features = torch.ones(7, 2)
    signals = Signals.of(sums(Prediction(features, ROWS), Prediction(features, ROWS), 3), 3)
    assert signals.agreement == pytest.approx(2 / 7)
    totals = agreement(ROWS[:, None], ROWS[:, None])
    assert mean_agreement(totals[None]).share == pytest.approx(2 / 7)


@pytest.mark.parametrize("content", [{"a": NAN}, {"a": [1.0, INF]}, [-INF], {"a": {"b": (NAN, 1)}}, NAN, {"a": 1.5}])
def test_json_is_strict(content, tmp_path):
    def refuse(text):
        raise AssertionError(text)

    save_json(tmp_path / "x.json", content)
    back = json.loads((tmp_path / "x.json").read_text(), parse_constant=refuse)
    assert back == json.loads(strict_json(content), parse_constant=refuse)
    assert strict_json({"a": [NAN, 1.5]}) == '{"a": [null, 1.5]}'


class Bare(nn.Module):
    """Says nothing of its width."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(48, 6)

    def forward(self, images):
        return self.lin(images.flatten(1))


@pytest.mark.parametrize("transposed", [["red"], ["red", "green", "blue"]])
@pytest.mark.parametrize("stated", [True, False])
def test_transposed_heads_are_named_with_the_cause(heads, transposed, stated):
    tower = Bare()
    if stated:
        tower.output_dim = 6
    bank = am.TaskVectors.from_state_dicts(tower.state_dict(), dict.fromkeys(heads, tower.state_dict()))
    odd = {task: head.T if task in transposed else head for task, head in heads.items()}
    with pytest.raises(am.InputError, match=r"head of task 'red' .*\(6, 3\).*it looks transposed: give `head.T`"):
        am.TaskArithmetic(bank, tower, odd)("red", torch.rand(2, 3, 4, 4))


@pytest.mark.parametrize("heads_, message", [
    (torch.zeros(3, 6), "`heads` are task → head, got a Tensor"),
    ([torch.zeros(3, 6)], "got a list"),
])  # fmt: skip
def test_bare_tensors_in_place_of_mappings(toy, bank, images, heads_, message):
    with pytest.raises(am.InputError, match=message):
        am.TaskArithmetic(bank, toy, heads_)


@pytest.mark.parametrize("value", [torch.zeros(4, 2, 2, 3), None, [1]], ids=["tensor", "none", "list"])
def test_a_stream_of_bare_tensors(value):
    with pytest.raises(am.InputError, match="images.* am.Images"):
        am.TaskStream({"red": value}).draws  # noqa: B018
    with pytest.raises(am.InputError, match="images.* task → am.Images"):
        am.TaskStream(value)


def test_a_state_dict_in_place_of_the_bank(toy, heads):
    with pytest.raises(am.InputError, match="`task_vectors` is a dict; .*TaskVectors.from_state_dicts"):
        am.TaskArithmetic(dict(toy.state_dict()), toy, heads)
