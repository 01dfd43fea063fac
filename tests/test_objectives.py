import pytest
import torch
from torch.nn import functional as F

from adaptive_merge.errors import InputError
from adaptive_merge.objectives import (
    Entropy,
    ExpertDivergence,
    FeatureDistance,
    Prediction,
    PseudoLabel,
    entropy,
    feature_distance,
    jensen_shannon,
    normalised_entropy,
)

SCALES = [0.0, 1.0, 30.0, 1e4]
EXTREME = torch.tensor([[1e4, -1e4, 0.0], [0.0, float("-inf"), 1.0], [0.0, 0.0, 0.0], [1e-30, -1e30, 1e30]])


def logits(scale, seed):
    return scale * torch.randn(50, 7, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", SCALES)
def test_entropy_against_float64(scale):
    exact = torch.distributions.Categorical(logits=logits(scale, 1).double()).entropy()
    torch.testing.assert_close(entropy(logits(scale, 1)).double(), exact, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("scale", SCALES)
def test_jensen_shannon_against_float64(scale):
    p, q = (logits(scale, seed).double().softmax(1) for seed in (1, 2))
    m = (p + q) / 2
    exact = 0.5 * (torch.xlogy(p, p / m).nan_to_num() + torch.xlogy(q, q / m).nan_to_num()).sum(1)
    torch.testing.assert_close(jensen_shannon(logits(scale, 1), logits(scale, 2)).double(), exact, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["l1", "l2", "smooth_l1", "cosine"])
def test_distances_are_per_image_and_zero_for_equal_features(kind):
    a, b = torch.randn(4, 6), torch.randn(4, 6)
    assert feature_distance(a, b, kind).shape == (4,) and (feature_distance(a, b, kind) > 0).all()
    torch.testing.assert_close(feature_distance(a, a, kind), torch.zeros(4), atol=1e-6, rtol=0)
    if kind == "l1":
        torch.testing.assert_close(feature_distance(a, b, kind).mean(), F.l1_loss(a, b))


@pytest.mark.parametrize(
    "objective", [Entropy(), PseudoLabel(), PseudoLabel(soft=True), ExpertDivergence(), FeatureDistance("cosine")]
)
def test_gradients_stay_finite_on_extreme_logits(objective):
    given = EXTREME.clone().requires_grad_()
    features = EXTREME.nan_to_num(neginf=0.0).requires_grad_()
    expert = Prediction(torch.ones(4, 3), torch.tensor([[0.0, 1e4, 0.0]] * 4))
    # A label on a class at −inf has an infinite loss by right; its own case is not of interest here.
    rows = [0, 2, 3] if isinstance(objective, PseudoLabel) else [0, 1, 2, 3]
    prediction = Prediction(features[rows], given[rows])
    objective.losses(prediction, Prediction(expert.features[rows], expert.logits[rows])).sum().backward()
    assert all(torch.isfinite(leaf.grad).all() for leaf in (given, features) if leaf.grad is not None)


def test_soft_labels_against_float64():
    p, q = logits(3.0, 1), logits(3.0, 2)
    exact = -(q.double().softmax(1) * p.double().log_softmax(1)).sum(1)
    found = PseudoLabel(soft=True).losses(Prediction(p, p), Prediction(q, q))
    torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=1e-5)


def test_normalised_entropy_spans_zero_to_one():
    assert normalised_entropy(torch.zeros(3, 5)) == pytest.approx(1.0)
    assert normalised_entropy(torch.eye(5) * 1e3) == pytest.approx(0.0, abs=1e-6)


def test_unknown_distance():
    with pytest.raises(InputError, match="unknown feature distance 'l3'"):
        FeatureDistance("l3")
