import math

import pytest
import torch
from conftest import perturbed
from fitting import fit
from torch.nn import functional as F

import adaptive_merge as am
from adaptive_merge.errors import InputError
from adaptive_merge.objectives.base import Prediction
from adaptive_merge.objectives.certainty import Entropy
from adaptive_merge.objectives.functional import entropy, feature_distance, jensen_shannon, normalised_entropy
from adaptive_merge.objectives.taught import ExpertDivergence, FeatureDistance, PseudoLabel

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
    "objective",
    [
        *(Entropy(), Entropy(diversity=2.0), Entropy(reliable=0.5), Entropy(1.0, reliable=1.0)),
        *(PseudoLabel(), PseudoLabel(soft=True), ExpertDivergence(), FeatureDistance("cosine")),
    ],
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


def batch_formula(given, diversity, reliable):
    """The loss of a batch as one would write it down: the mean of w·H over the kept, less diversity · H(p̄)."""
    entropies = torch.distributions.Categorical(logits=given).entropy()
    margin = float("inf") if reliable is None else reliable * math.log(given.shape[1])
    kept = entropies < margin
    weights = 1.0 if reliable is None else (margin - entropies[kept]).exp().detach()
    mean = given.softmax(1)[kept].mean(0)
    return (weights * entropies[kept]).mean() + diversity * (mean * mean.log()).sum()


@pytest.mark.parametrize("classes", [2, 7])
@pytest.mark.parametrize(("diversity", "reliable"), [(0.0, None), (0.7, None), (0.0, 0.6), (1.3, 0.6)])
def test_entropy_with_parts_is_the_formula_of_the_batch(classes, diversity, reliable):
    given = (3 * torch.randn(40, classes, generator=torch.Generator().manual_seed(1))).double().requires_grad_()
    prediction, objective = Prediction(given, given), Entropy(diversity, reliable)
    keep = objective.keep(prediction, None)
    assert keep.all() if reliable is None else 0 < keep.sum() < len(keep)
    ours = objective.losses(prediction, None).where(keep, 0.0).mean() / keep.double().mean()
    exact = batch_formula(given, diversity, reliable)
    torch.testing.assert_close(ours, exact, atol=1e-12, rtol=1e-12)
    grads = [torch.autograd.grad(loss, given)[0] for loss in (ours, exact)]
    torch.testing.assert_close(*grads, atol=1e-12, rtol=1e-10)


def test_the_mean_prediction_is_that_of_all_processes():
    """Two processes of unequal parts, one of them empty-handed, give the gradient of one process with all images."""
    given = (2 * torch.randn(12, 4, generator=torch.Generator().manual_seed(2))).double()
    whole = given.clone().requires_grad_()
    batch_formula(whole, 0.9, 0.8).backward()
    for cut in (0, 5):
        objective, parts, found = Entropy(0.9, reliable=0.8), (given[:cut], given[cut:]), []
        means = sum(objective.statistics(Prediction(part, part), None).sum(0) / 12 for part in parts)
        for part in parts:
            leaf = part.clone().requires_grad_()
            prediction = Prediction(leaf, leaf, statistics=means)
            losses = objective.losses(prediction, None).where(objective.keep(prediction, None), 0.0)
            (losses.sum() / 12 / means[0]).backward()
            found.append(leaf.grad)
        torch.testing.assert_close(torch.cat(found), whole.grad, atol=1e-12, rtol=1e-10)


def test_diversity_holds_off_the_collapse_to_one_class():
    """A classifier that leans to one class: entropy alone gives it everything, with diversity it does not."""
    torch.manual_seed(0)
    inputs = torch.randn(90, 6)
    shares = {}
    for diversity in (0.0, 1.0):
        layer = torch.nn.Linear(6, 3)
        with torch.no_grad():
            layer.weight.mul_(0.5)
            layer.bias.copy_(torch.tensor([3.0, 0.0, 0.0]))
        optimiser, objective = torch.optim.Adam(layer.parameters(), lr=0.05), Entropy(diversity)
        for _ in range(200):
            given = layer(inputs)
            optimiser.zero_grad()
            objective.losses(Prediction(inputs, given), None).mean().backward()
            optimiser.step()
        shares[diversity] = (layer(inputs).argmax(1) == 0).float().mean().item()
    assert shares[0.0] > 0.95 and shares[1.0] < 0.5


def test_two_classes_still_adapt_with_the_filter(toy, bank, heads, images):
    """EATA's margin ln C / 2 - 1 is negative for two classes; a part of ln C is not."""
    single = {"blue": images["blue"]}
    alone = am.TaskVectors.from_state_dicts(toy.state_dict(), {"blue": perturbed(toy.state_dict(), 2)})
    module = am.AdaMerging(alone, toy, {"blue": heads["blue"]}, objective=Entropy(reliable=0.4))
    start = module.coefficients.values.detach().clone()
    fit(module, single)
    assert (module.coefficients.values - start).abs().max() > 1e-3


def test_nothing_reliable_changes_nothing(toy, bank, heads, images):
    flat = {task: head / 1000 for task, head in heads.items()}  # every prediction is close to uniform
    module = am.AdaMerging(bank, toy, flat, objective=Entropy(diversity=1.0, reliable=0.4), lr=0.1)
    trajectory = fit(module, images)
    assert (trajectory == 0.3).all()


@pytest.mark.parametrize("wrong", [{"diversity": -1.0}, {"reliable": 0.0}, {"reliable": 1.5}])
def test_impossible_parts_of_the_entropy(wrong):
    with pytest.raises(InputError, match="`diversity` is at least 0 and `reliable`"):
        Entropy(**wrong)


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


@pytest.mark.parametrize("objective", [FeatureDistance(), PseudoLabel(soft=True), PseudoLabel(), ExpertDivergence()])
def test_without_an_expert_nothing_is_taught(objective):
    with pytest.raises(InputError, match="give the expert's prediction"):
        objective.losses(Prediction(torch.randn(2, 4), torch.randn(2, 3)), None)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("scaled", [False, True])
def test_temperature_kl_against_float64(temperature, scaled):
    ours, expert = logits(3.0, 1).requires_grad_(), logits(3.0, 2)
    q, p = (torch.distributions.Categorical(logits=x.detach().double() / temperature) for x in (ours, expert))
    factor = temperature**2 if scaled else 1
    losses = am.ExpertKL(temperature, scaled).losses(Prediction(ours, ours), Prediction(expert, expert))
    torch.testing.assert_close(losses.double(), factor * torch.distributions.kl_divergence(p, q), atol=2e-6, rtol=1e-5)
    losses.sum().backward()
    torch.testing.assert_close(ours.grad.double(), factor / temperature * (q.probs - p.probs), atol=1e-6, rtol=1e-5)
    assert am.ExpertKL(temperature, scaled).losses(Prediction(ours, ours), Prediction(ours, ours)).abs().max() < 1e-5


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.inf])
def test_impossible_temperatures(wrong):
    with pytest.raises(InputError, match="`temperature` is a positive number"):
        am.ExpertKL(wrong)
    with pytest.raises(InputError, match="`alpha` is a positive number"):
        am.Balance(alpha=wrong)
