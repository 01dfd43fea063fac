import copy

import pytest
import reference
import torch
from torch import nn
from torch.func import functional_call

import adaptive_merge as am
from adaptive_merge.merge.passes import combine


def batch():
    return torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(3))


def test_zero_coefficients_give_the_pretrained_bits(toy, bank):
    merged = am.MergedBackbone(toy, bank, am.Fixed(0.0)).merged_state_dict()
    assert all(torch.equal(merged[name], value) for name, value in toy.state_dict().items())


def test_one_hot_coefficients_give_the_expert(toy, bank, experts):
    merged = am.MergedBackbone(toy, bank, am.Fixed([0.0, 1.0, 0.0])).merged_state_dict()
    for name, value in experts["green"].items():
        torch.testing.assert_close(merged[name], value, atol=1e-6, rtol=0)


def test_merging_twice_gives_the_same_and_leaves_the_backbone_alone(toy, bank):
    before, base = copy.deepcopy(toy.state_dict()), bank.pretrained.clone()
    merged = am.MergedBackbone(toy, bank, am.LayerWise())
    first, second = merged.merged_state_dict(), merged.merged_state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(before[name], value) for name, value in toy.state_dict().items())
    assert torch.equal(base, bank.pretrained)


def test_merged_forward_equals_loading_the_merged_weights(toy, bank):
    merged = am.MergedBackbone(toy, bank, am.LayerWise())
    features = merged(batch())
    toy.load_state_dict(merged.merged_state_dict())
    torch.testing.assert_close(features, toy(batch()), atol=1e-6, rtol=0)


@pytest.mark.parametrize("coefficients", [am.TaskWise, am.LayerWise])
def test_gradient_equals_the_naive_one(toy, bank, coefficients):
    merged = am.MergedBackbone(toy, bank, coefficients(init=0.4))
    merged(batch()).square().sum().backward()
    naive = merged.coefficients.values.detach().clone().requires_grad_()
    vectors = [bank.layout.unflatten(vector) for vector in bank.vectors]
    weights = reference.merge(bank.layout.unflatten(bank.pretrained), vectors, naive)
    functional_call(toy, weights, (batch(),)).square().sum().backward()
    torch.testing.assert_close(merged.coefficients.values.grad, naive.grad, rtol=1e-5, atol=1e-5)


def test_block_gradient_is_the_sum_over_the_block(toy, bank):
    layer, block = (am.MergedBackbone(toy, bank, kind(init=0.4)) for kind in (am.LayerWise, am.BlockWise))
    for merged in (layer, block):
        merged(batch()).square().sum().backward()
    assert block.coefficients.groups == ("before", "blocks.0", "blocks.1")
    members = [index for index, group in enumerate(block.coefficients.group_of) if group == 1]
    torch.testing.assert_close(block.coefficients.values.grad[:, 1], layer.coefficients.values.grad[:, members].sum(1))


def test_the_merge_is_one_graph_node_and_carries_no_bank(toy, bank):
    merged = am.MergedBackbone(toy, bank, am.LayerWise())
    weights = merged.merge()
    assert len({id(value.grad_fn) for value in weights.values()}) == 1
    assert list(merged.state_dict()) == ["coefficients.values"]
    assert sum(p.numel() for p in merged.parameters()) == len(bank.tasks) * len(bank.names)
    assert not list(merged.buffers())


def test_a_step_merges_into_the_buffer_of_the_one_before_and_older_graphs_refuse(toy, bank):
    merged = am.MergedBackbone(toy, bank, am.LayerWise())
    x = torch.randn(2, 3, 4, 4)

    def loss(weights):
        return merged(x, weights).square().sum()

    places, first = [], loss(merged.merge(over=True))
    for over in (True, False):
        merged.zero_grad()
        weights = merged.merge(over)
        places.append(weights["proj"].untyped_storage().data_ptr())
        loss(weights).backward()
        if over:
            expected = merged.coefficients.values.grad.clone()
    assert torch.equal(merged.coefficients.values.grad, expected)
    assert places[0] != places[1] and merged.merge(over=True)["proj"].untyped_storage().data_ptr() == places[0]
    with pytest.raises(RuntimeError, match="modified (by an )?inplace"):
        first.backward()


def test_fixed_coefficients_merge_once(toy, bank):
    merged = am.MergedBackbone(toy, bank, am.Fixed(0.3))
    assert merged.merge() is merged.merge()


def test_bfloat16_bank_accumulates_in_float32(toy, experts, bank):
    half = am.TaskVectors.from_state_dicts(toy.state_dict(), experts, dtype=torch.bfloat16)
    coefficients = torch.full((3, 1), 0.3)
    groups = [0] * len(bank.names)
    merged = combine(half, coefficients, groups)
    assert merged.dtype == torch.float32
    exact = half.pretrained + 0.3 * half.vectors.float().sum(0)
    torch.testing.assert_close(merged, exact, atol=1e-6, rtol=1e-6)
    assert (merged - combine(bank, coefficients, groups)).abs().max() < 1e-2


def test_buffers_travel_and_uint8_images_are_normalised(toy, bank):
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    merged = am.MergedBackbone(toy, bank, am.Fixed())
    torch.testing.assert_close(merged(images), merged((images / 255 - 0.5) / 0.25))
    norm = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    buffered = am.TaskVectors.from_state_dicts(
        norm.state_dict(), {"a": norm.state_dict()}, buffers=dict(norm.named_buffers())
    )
    x = torch.randn(4, 3)
    torch.testing.assert_close(am.MergedBackbone(norm, buffered, am.Fixed())(x), norm(x))
    assert am.MergedBackbone(norm, buffered, am.Fixed()).merged_state_dict().keys() == norm.state_dict().keys()


def test_a_bank_of_another_backbone_is_refused(bank):
    with pytest.raises(am.InputError, match="'weight' is not in the task vectors"):
        am.MergedBackbone(nn.LayerNorm(8), bank, am.Fixed())


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x))

    tied = Tied()
    state = {name: value.detach() for name, value in tied.named_parameters()}
    bank = am.TaskVectors.from_state_dicts(state, {"a": {name: value + 1 for name, value in state.items()}})
    x = torch.randn(2, 3)
    merged = am.MergedBackbone(tied, bank, am.Fixed(1.0))
    weight = state["first.weight"] + 1
    torch.testing.assert_close(merged(x), x @ weight.T @ weight.T)


def test_an_empty_batch_has_features_and_a_gradient_on_a_real_tower():
    suite = am.load_suite("embedded", tasks=["digits", "thai"])
    backbone = am.MergedBackbone(suite.backbone, suite.task_vectors, am.LayerWise())
    features = backbone(suite.images["digits"].take(torch.arange(0)))
    assert features.shape == (0, 128)
    features.sum().backward()
    assert (backbone.coefficients.values.grad == 0).all()
    edits = am.SurgeryV2(suite.task_vectors, suite.backbone, suite.heads)
    said = edits.model("digits", suite.images["digits"].take(torch.arange(0)), blocks=True)
    assert said.logits.shape[0] == 0 and {len(mean) for mean in said.blocks} == {0}
