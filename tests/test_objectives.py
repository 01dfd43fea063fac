import pytest
import torch

from adaptive_merge.objectives import entropy, normalised_entropy


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1e4])
def test_entropy_against_float64(scale):
    logits = scale * torch.randn(50, 7, generator=torch.Generator().manual_seed(1))
    exact = torch.distributions.Categorical(logits=logits.double()).entropy()
    torch.testing.assert_close(entropy(logits).double(), exact, atol=2e-6, rtol=1e-5)


def test_gradients_stay_finite_on_saturated_and_masked_logits():
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, float("-inf"), 1.0], [0.0, 0.0, 0.0]], requires_grad=True)
    entropy(logits).sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_normalised_entropy_spans_zero_to_one():
    assert normalised_entropy(torch.zeros(3, 5)) == pytest.approx(1.0)
    assert normalised_entropy(torch.eye(5) * 1e3) == pytest.approx(0.0, abs=1e-6)
