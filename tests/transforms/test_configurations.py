"""The configurations of the embedded suite: what they name exists, and the merges are as accurate as we say."""

from pathlib import Path

import jsonargparse
import pytest
import torch
import yaml
from torch.func import functional_call

import adaptive_merge as am
from adaptive_merge.transforms.base import Transform

FOLDER = Path(__file__).parents[2] / "configs" / "embedded"
ACCURACY = {"tsvm": 78.1, "iso_c": 77.1, "iso_cts": 77.1, "cart": 77.0, "svc": 72.8, "doge": 75.1, "wudi": 78.1}
NAMES = [*ACCURACY, "breadcrumbs", "consensus", "dare", "layer_drop", "lines", "star"]


def read(name):
    """The transforms and the equal coefficient."""
    model = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["model"]
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--transforms", type=list[Transform])
    written = {"transforms": model["transforms"]}
    return parser.instantiate_classes(parser.parse_object(written)).transforms, model["coefficients"]["init_args"]


@pytest.mark.parametrize("name", NAMES)
def test_names_what_exists(name):
    (transform,), coefficients = read(name)
    assert coefficients.keys() == {"init"}
    assert isinstance(transform, Transform)


@pytest.mark.slow
@pytest.mark.parametrize("name", ACCURACY)
def test_accuracy_on_the_embedded_suite(name):
    suite = am.load_suite("embedded")
    (transform,), coefficients = read(name)
    bank = suite.task_vectors
    merged = bank.pretrained + coefficients["init"] * transform(bank).vectors.sum(0)
    parameters = bank.layout.unflatten(merged)
    shares = [accuracy(suite, parameters, task) for task in bank.tasks]
    assert 100 * sum(shares) / len(shares) == pytest.approx(ACCURACY[name], abs=0.2)


@torch.no_grad()
def accuracy(suite, parameters, task):
    images = suite.images[task]
    pixels = images.take(torch.arange(len(images))).float() / 255
    mean, std = (torch.tensor(value)[:, None, None] for value in (suite.backbone.image_mean, suite.backbone.image_std))
    features = functional_call(suite.backbone.eval(), parameters, ((pixels - mean) / std,))
    found = torch.nn.functional.normalize(features, dim=-1) @ suite.heads[task].T
    return (found.argmax(1) == images.labels).float().mean().item()
