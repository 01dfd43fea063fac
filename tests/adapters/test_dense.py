"""Dense prediction: units are not images. Two segmentation experts of a tiny tower, merged and adapted."""

from __future__ import annotations

import copy

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F

import adaptive_merge as am

SIDE, PATCH, WIDTH, TOKENS = 16, 4, 24, 16
CLASSES = {"shapes": 3, "stripes": 2}


class Tower(nn.Module):
    """Patches, two blocks of attention and MLP, and the tokens of an image as one row [16 · 24]."""

    image_mean, image_std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.places = nn.Parameter(0.1 * torch.randn(TOKENS, WIDTH))
        layer = {"dim_feedforward": 48, "dropout": 0.0, "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, 2, **layer) for _ in range(2))

    def forward(self, images):
        tokens = self.patches(images).flatten(2).mT + self.places
        for block in self.blocks:
            tokens = block(tokens)
        return tokens.flatten(1)


def scenes(task, count, seed):
    """uint8 [N, 16, 16, 3] and a class for each of the 16 patches [N, 16]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES[task], (count, 4, 4), generator=generator)
    large = labels.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)
    pixels = torch.randint(0, 150, (count, SIDE, SIDE, 3), generator=generator)
    rows = torch.arange(SIDE)
    if task == "shapes":  # a bright dot or a bright frame in the patch, or nothing
        dot = ((rows % PATCH - 1.5).abs() < 1)[:, None] & ((rows % PATCH - 1.5).abs() < 1)[None]
        pixels[(large == 1) & dot] += 45
        pixels[(large == 2) & ~dot] += 45
    else:  # stripes across or along
        pixels[(large == 0) & (rows % 2 == 0)[:, None]] += 45
        pixels[(large == 1) & (rows % 2 == 0)[None]] += 45
    return pixels.to(torch.uint8), labels.flatten(1)


def train(tower, head, task, steps):
    parameters = [*tower.parameters(), *head.parameters()] if head.weight.requires_grad else tower.parameters()
    optimiser = torch.optim.Adam(parameters, 2e-3)
    pixels, labels = scenes(task, 512, 1)
    for step in range(steps):
        part = slice(32 * (step % 16), 32 * (step % 16) + 32)
        logits = head(tower((pixels[part].movedim(-1, 1).float() / 255 - 0.5) / 0.5))
        optimiser.zero_grad()
        F.cross_entropy(logits, labels[part].flatten()).backward()
        optimiser.step()


@pytest.fixture(scope="module")
def suite():
    torch.manual_seed(0)
    tower = Tower()
    heads = {task: am.DenseHead(0.3 * torch.randn(classes, WIDTH), tokens=TOKENS) for task, classes in CLASSES.items()}
    for _ in range(2):  # a pre-trained tower that knows a little of both
        for task, head in heads.items():
            train(tower, head, task, 4)
    experts = {}
    for task, head in heads.items():
        expert = copy.deepcopy(tower)
        train(expert, head.requires_grad_(False), task, 160)
        experts[task] = expert.state_dict()
    bank = am.TaskVectors.from_state_dicts(tower.state_dict(), experts)
    images = {task: am.Images(*scenes(task, 96, 2), [str(index) for index in range(n)]) for task, n in CLASSES.items()}
    return bank, tower, heads, images


def fitted(suite, **parts):
    bank, tower, heads, images = suite
    torch.manual_seed(0)
    module = am.AdaptiveMerge(bank, tower, heads, **parts)
    stream = am.TaskStream(images, images_per_task=16)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(max_steps=60, accelerator="cpu", **quiet)
    trainer.fit(module, datamodule=stream)
    return module, am.score(trainer, module, stream)


def test_experts_are_scored_by_their_own_mean_iou(suite):
    bank, tower, heads, images = suite
    module, found = fitted(suite, objective=am.PseudoLabel(), coefficients=am.LayerWise(0.3))
    for task in CLASSES:
        expert = copy.deepcopy(tower)
        expert.load_state_dict(bank.expert(task))
        with torch.no_grad():
            tokens = expert.eval()(module.model.backbone.normalise(images[task].take(torch.arange(96))))
            predicted = (tokens.view(-1, WIDTH) @ heads[task].weight.T).argmax(-1)
        labels, ratios = images[task].labels.flatten(), []
        for one in range(CLASSES[task]):
            both = ((predicted == one) & (labels == one)).sum()
            ratios.append(float(both / ((predicted == one) | (labels == one)).sum()))
        assert found["individual"][task] == pytest.approx(sum(ratios) / len(ratios), abs=1e-6)
        assert found["individual"][task] > 0.9


@pytest.mark.parametrize("method", ["tinting", "surgery"])
def test_adapters_bring_dense_tasks_nearer_to_their_experts(suite, method):
    parts = {
        "tinting": {
            "coefficients": am.LayerWise(0.3),
            "adapters": [am.Tint("head")],
            "objective": am.PseudoLabel(soft=True),
            "lr": 2e-2,
        },
        "surgery": {
            "coefficients": am.Fixed(0.3),
            "adapters": [am.FeatureSurgery(8)],
            "objective": am.FeatureDistance(),
            "lr": 1e-2,
        },
    }[method]
    _, found = fitted(suite, **parts)
    means = {view: sum(row.values()) / len(row) for view, row in found.items()}
    assert means["adapted"] > means["initial"] + 0.02, means
    assert means["individual"] >= means["adapted"] - 0.02


def test_mean_iou_leaves_out_classes_that_nobody_has():
    metric = am.MeanIoU(4)
    metric.update(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1]))
    assert float(metric.compute()) == pytest.approx((1 / 2 + 2 / 3) / 2)
    metric.update(torch.tensor([3]), torch.tensor([0]))
    assert float(metric.compute()) == pytest.approx((1 / 3 + 2 / 3 + 0) / 3)
    assert am.MeanIoU(2).compute().isnan()


@pytest.mark.parametrize(
    ("weight", "bias", "tokens"), [((3,), None, 2), ((3, 4), (4,), 2), ((3, 4), None, 0), ((3, 4, 1), None, 1)]
)
def test_shapes_that_do_not_fit_are_refused(weight, bias, tokens):
    with pytest.raises(am.InputError, match="a dense head has"):
        am.DenseHead(torch.zeros(weight), None if bias is None else torch.zeros(bias), tokens=tokens)
