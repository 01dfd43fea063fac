"""BatchNorm: every model of a run is scored with its own running statistics, as its own library does."""

from __future__ import annotations

import copy
import json

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torchvision.models import resnet18

import adaptive_merge as am
from adaptive_merge.callbacks.guard.watch import Watch
from adaptive_merge.callbacks.record.diagnostics import Diagnostics
from adaptive_merge.callbacks.safe.ranks import Ranks
from adaptive_merge.merge.bank_file import kept_bank

TASKS = ("dark", "light", "noisy")
SILENT = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}


def tower() -> nn.Module:
    model = resnet18(weights=None, num_classes=8)
    model.image_mean, model.image_std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    return model.eval()


def pixels_of(task: str, count: int) -> torch.Tensor:
    """Images whose statistics differ from task to task."""
    generator = torch.Generator().manual_seed(TASKS.index(task))
    low, high = {"dark": (0, 60), "light": (180, 256), "noisy": (0, 256)}[task]
    return torch.randint(low, high, (count, 32, 32, 3), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    """A pre-trained ResNet-18 and three that went on in training mode, each on images of its own."""
    torch.manual_seed(0)
    pretrained = tower()
    found = {"pretrained": pretrained}
    for seed, task in enumerate(TASKS, 1):
        model = copy.deepcopy(pretrained).train()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
            for _ in range(3 + seed):  # so that the counters differ, too
                model(pixels_of(task, 16).movedim(-1, 1).float().div(255).sub(0.5).div(0.25))
        found[task] = model.eval()
    return found


def heads_for(models: dict[str, nn.Module]) -> dict[str, nn.Linear]:
    torch.manual_seed(1)
    return {task: nn.Linear(8, 5) for task in TASKS}


@pytest.fixture(scope="module")
def bank(models) -> am.TaskVectors:
    states = {task: models[task].state_dict() for task in TASKS}
    return am.TaskVectors.from_state_dicts(
        models["pretrained"].state_dict(), states, buffers=[name for name, _ in models["pretrained"].named_buffers()]
    )


@pytest.fixture(scope="module")
def heads(models):
    return heads_for(models)


@pytest.fixture(scope="module")
def said(models, heads):
    """(model, task) → logits as plain torchvision and torch give them."""

    @torch.no_grad()
    def logits(name: str, task: str) -> torch.Tensor:
        images = pixels_of(task, 24).movedim(-1, 1).float().div(255).sub(0.5).div(0.25)
        return heads[task](models[name](images))

    return {(name, task): logits(name, task) for name in ("pretrained", *TASKS) for task in TASKS}


@pytest.fixture
def images(said):
    """Half of the labels are what the expert says, half are not: an accuracy of 1/2, image by image known."""
    classes = [str(c) for c in range(5)]
    labels = {task: said[task, task].argmax(-1) + (torch.arange(24) % 2) for task in TASKS}
    return {task: am.Images(pixels_of(task, 24), labels[task] % 5, classes) for task in TASKS}


def test_models_are_scored_as_torchvision_scores_them(models, bank, heads, images, said):
    module = am.AdaMerging(bank, tower(), heads)
    found = am.score(pl.Trainer(**SILENT), module, am.TaskStream(images))
    for task in TASKS:
        for view, name in {"pretrained": "pretrained", "individual": task}.items():
            own = (said[name, task].argmax(-1) == images[task].labels).float().mean().item()
            assert found[view][task] == own
        assert found["individual"][task] == 0.5
    assert len({tuple(said[task, task].argmax(-1).tolist()) for task in TASKS}) > 1


@pytest.mark.parametrize(
    "options",
    [{}, {"unseen": ["noisy"]}, {"transforms": [am.Ties()]}, {"bank": "streamed"}],
    ids=["plain", "unseen", "transformed", "streamed"],
)
def test_teachers_and_views_give_torchvisions_logits(models, bank, heads, images, said, options):
    module = am.AdaMerging(bank, tower(), heads, **options)
    for task in TASKS:
        part = {"image": images[task].take(torch.arange(24)), "index": torch.arange(24)}
        expert = module.views.expert(task, part, images[task])
        torch.testing.assert_close(expert.logits, said[task, task], rtol=1e-4, atol=1e-5)
        assert torch.equal(expert.logits.argmax(-1), said[task, task].argmax(-1))
        for view, name in {"pretrained": "pretrained", "individual": task}.items():
            ours = module.model(task, part["image"], module.views.weights(view, task), adapted=False)
            torch.testing.assert_close(ours.logits, said[name, task], rtol=1e-4, atol=1e-5)


def test_a_merge_has_the_mean_of_its_own_experts(models, bank, heads):
    name = "layer3.1.bn2.running_var"
    own = {task: models[task].state_dict()[name] for task in TASKS}
    module = am.AdaMerging(bank, tower(), heads, unseen=["noisy"])
    merged = module.merged_state_dict()
    torch.testing.assert_close(merged[name], (own["dark"] + own["light"]) / 2)
    torch.testing.assert_close(bank.buffers[name], sum(own.values()) / 3)
    assert torch.equal(bank.expert("light")[name], own["light"])
    tower().load_state_dict(merged)


def test_the_guard_and_the_cross_matrix_see_the_same_experts(models, bank, heads, images, said, tmp_path):
    module, stream = am.AdaMerging(bank, tower(), heads), am.TaskStream(images, 4)
    trainer = pl.Trainer(max_steps=1, **SILENT)
    trainer.fit(module, datamodule=stream)
    watch = Watch(module, Ranks(), 24)
    parts = {task: {"image": images[task].take(torch.arange(24)), "index": torch.arange(24)} for task in TASKS}
    for task, part in parts.items():
        expert = watch._views.expert(task, part, images[task])
        assert torch.equal(expert.logits.argmax(-1), said[task, task].argmax(-1))
    trainer = pl.Trainer(callbacks=[Diagnostics(folder=str(tmp_path), images=96, cross=True)], **SILENT)
    am.score(trainer, module, am.TaskStream(images))
    from safetensors.torch import load_file

    cross = load_file(tmp_path / "diagnostics.safetensors")["cross"]
    for row, expert in enumerate(TASKS):
        for column, task in enumerate(TASKS):
            own = (said[expert, task].argmax(-1) == images[task].labels).float().mean()
            assert cross[row, column] == own


def test_a_bank_file_keeps_them_and_an_old_one_is_read(bank, tmp_path):
    kept = kept_bank(bank, tmp_path)
    assert kept.fingerprint == bank.fingerprint and set(kept.own) == set(bank.own)
    for task in (None, *TASKS):
        for name, value in bank.buffers_of(task).items():
            assert torch.equal(kept.buffers_of(task)[name], value)
    old = am.TaskVectors(bank.tasks, bank.layout, bank.pretrained, bank.vectors, bank.buffers)
    old.save(tmp_path / "old.safetensors")
    assert "own" not in json.dumps(list(am.TaskVectors.load(tmp_path / "old.safetensors").own))
    assert old.fingerprint != bank.fingerprint
    for task in TASKS:  # what is cached of an expert with averaged statistics is not what it says
        assert old.identity(task) != bank.identity(task)


def test_a_bank_whose_statistics_were_changed_is_refused(bank, tmp_path):
    name = next(iter(bank.own))
    changed = {**bank.own, name: bank.own[name] + 1}
    other = am.TaskVectors(bank.tasks, bank.layout, bank.pretrained, bank.vectors, bank.buffers, changed)
    assert other.fingerprint != bank.fingerprint


def test_without_buffers_the_remedy_is_named(models):
    states = {task: models[task].state_dict() for task in TASKS}
    bank = am.TaskVectors.from_state_dicts(models["pretrained"].state_dict(), states)
    with pytest.raises(am.InputError, match=r"'bn1.running_mean' .* as a parameter but as a buffer; .*buffers=\["):
        am.MergedBackbone(tower(), bank, am.Fixed())


COUNTERS = ["bn.num_batches_tracked", "n_averaged", "ema.num_updates"]


@pytest.mark.parametrize("name", COUNTERS)
@pytest.mark.parametrize("absent", [False, True])
def test_counters_keep_no_models_apart(name, absent):
    base = {"w": torch.ones(2), name: torch.tensor(3)}
    experts = {"a": {"w": torch.zeros(2), name: torch.tensor(5)}, "b": {"w": torch.ones(2), name: torch.tensor(9)}}
    if absent:
        del experts["a"][name]
    assert int(am.TaskVectors.from_state_dicts(base, experts).buffers[name]) == 9


@pytest.mark.parametrize(
    "change, message",
    [
        ({"table": torch.tensor([1, 2])}, "integer buffer 'table' differs"),
        ({"mask": torch.tensor([True, False])}, "integer buffer 'mask' differs"),
        ({"w": torch.ones(2, dtype=torch.int64)}, "expert 'b': 'w' is torch.int64, the pre-trained model has torch.fl"),
        ({"w": torch.ones(2, dtype=torch.int8)}, "'w' is torch.int8"),
        ({"w": torch.ones(2, dtype=torch.bool)}, "'w' is torch.bool"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "'w' is torch.complex64"),
        ({"w": [1.0, 1.0]}, "'w' is list"),
        ({"table": torch.ones(2)}, "'table' is torch.float32, the pre-trained model has torch.int64"),
        ({"w": torch.tensor([1.0, float("nan")])}, "expert 'b': tensor 'w' holds NaN"),
        ({"w": torch.tensor([1.0, float("inf")])}, "expert 'b': tensor 'w' holds NaN or inf"),
        ({"w": torch.tensor([3e38, 1.0])}, "expert 'b', minus the pre-trained weights"),
        ({"statistic": torch.tensor([float("nan")])}, "expert 'b': tensor 'statistic' holds NaN"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(change, message):
    base = {
        "w": torch.tensor([-3e38, 0.0]),
        "table": torch.tensor([2, 1]),
        "mask": torch.tensor([True, True]),
        "statistic": torch.ones(1),
        "causal": torch.full((1,), float("-inf")),
    }
    same = {**base, "w": torch.zeros(2)}
    with pytest.raises(am.InputError, match=message):
        am.TaskVectors.from_state_dicts(base, {"a": same, "b": same | change}, buffers=["statistic", "causal"])


@pytest.mark.parametrize("odd", ["pretrained", "experts", "expert", "value", "complex"])
def test_whatever_is_no_state_dict_is_refused_at_the_door(odd):
    state = {"w": torch.ones(2)}
    pretrained = {
        "pretrained": nn.Linear(2, 1), "value": {"w": 1.0}, "complex": {"w": torch.ones(2) * 1j}
    }.get(odd, state)  # fmt: skip
    experts = {"experts": [state], "expert": {"a": nn.Linear(2, 1)}}.get(odd, {"a": state})
    with pytest.raises(am.InputError, match="state dict"):
        am.TaskVectors.from_state_dicts(pretrained, experts)


def test_statistics_are_estimated_anew_from_the_stream(models, bank, heads, images):
    """The start's statistics are those of its own activations; its weights are the anchor's."""
    module = am.AdaptiveMerge(
        bank, tower(), heads, coefficients=am.LayerWise(0.3, bounds="free"), start=am.BatchStatistics()
    )
    stream = am.TaskStream(images, 4, start_images=24)
    trainer = pl.Trainer(max_steps=0, **SILENT)
    trainer.fit(module, datamodule=stream)
    scores = am.score(trainer, module, stream)
    assert scores["individual"] == dict.fromkeys(TASKS, 0.5)
    merged = module.merged_state_dict()
    anchor = {name: value for name, value in bank.layout.unflatten(module.begun.anchor).items()}
    assert all(torch.equal(merged[name], anchor[name]) for name in anchor)
    probe = tower()
    probe.load_state_dict(merged)
    seen = []
    probe.bn1.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0]))
    with torch.no_grad():
        for task in TASKS:
            probe(pixels_of(task, 24).movedim(-1, 1).float().div(255).sub(0.5).div(0.25))
    means = torch.stack([x.mean((0, 2, 3)) for x in seen])
    squares = torch.stack([x.square().mean((0, 2, 3)) for x in seen])
    torch.testing.assert_close(probe.bn1.running_mean, means.mean(0), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(probe.bn1.running_var, squares.mean(0) - means.mean(0).square(), rtol=1e-2, atol=1e-3)


def test_a_backbone_without_batch_norm_has_no_statistics(toy, experts):
    bank = am.TaskVectors.from_state_dicts(toy.state_dict(), experts)
    problem = am.starts.base.Problem(
        toy, bank, bank.pretrained, {task: [torch.rand(2, 3, 4, 4)] for task in bank.tasks}
    )
    with pytest.raises(am.InputError, match="needs a backbone with BatchNorm"):
        am.BatchStatistics().solve(problem)
