"""Each family's tower is walked as it runs; fused and split attention agree; all else goes by hooks."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from conftest import bank_of, images_of, small_vit
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

from adaptive_merge.merge.backbone import without_weights
from adaptive_merge.starts.families import describe
from adaptive_merge.starts.mats import MaTS
from adaptive_merge.starts.predictions import as_features
from adaptive_merge.starts.regmean import RegMean
from adaptive_merge.starts.regression import CompensatedRegression, FeatCal
from adaptive_merge.starts.tower import Chain
from adaptive_merge.suites.embedded_tower import build_encoder


class Wrapped(nn.Module):
    """A tower inside a module of the user's."""

    def __init__(self, tower):
        super().__init__()
        self.model = tower

    def forward(self, images):
        return as_features(self.model(images))


def hugging_face(kind):
    torch.manual_seed(0)
    return kind(
        CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            image_size=8, patch_size=4, projection_dim=6,
        )
    ).eval()  # fmt: skip


def timm_vit(**options):
    torch.manual_seed(0)
    sizes = dict(img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2, num_classes=6)
    return timm.models.VisionTransformer(**sizes, **options).eval()


class Convolutions(nn.Module):
    """Convolution, BatchNorm, and a linear map that is used twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.twice = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6)

    def forward(self, images):
        x = self.grouped(torch.relu(self.bn(self.conv(images)))).mean((2, 3))
        return self.head(torch.relu(self.twice(torch.relu(self.twice(x)))))


TOWERS = {
    "open_clip": small_vit,
    "open_clip layer scale": lambda: scaled(small_vit()),
    "hugging face": lambda: Wrapped(hugging_face(CLIPVisionModelWithProjection)),
    "hugging face bare": lambda: hugging_face(CLIPVisionModel),
    "timm": timm_vit,
    "timm mean": lambda: timm_vit(global_pool="avg", fc_norm=False),
    "timm layer scale": lambda: timm_vit(init_values=0.5),
    "timm plain": lambda: timm_vit(qkv_bias=False),
}


def scaled(tower):
    from open_clip.transformer import LayerScale

    for block in tower.transformer.resblocks:
        block.ls_1, block.ls_2 = LayerScale(16, 0.5), LayerScale(16, 0.7)
    return tower


def weights_of(backbone):
    tensors = dict(backbone.named_parameters()) | dict(backbone.named_buffers())
    return {name: tensor.detach() for name, tensor in tensors.items()}


def features(backbone, images):
    with torch.no_grad():
        return as_features(backbone(images))


@pytest.mark.parametrize("name", TOWERS)
def test_the_walk_gives_the_towers_own_features(name):
    backbone, images = TOWERS[name](), images_of()["red"][:4]
    state, weights = images, weights_of(backbone)
    with torch.no_grad():
        blocks = describe(without_weights(backbone), images, weights)
        assert sum(isinstance(block, Chain) for block in blocks) == 3
        for block in blocks:
            state = block.advance(weights, state)
    assert torch.allclose(state, features(backbone, images), atol=1e-5)


@pytest.mark.parametrize("name", TOWERS)
def test_a_start_comes_nearer_to_the_experts_than_its_anchor(make_problem, name):
    backbone = TOWERS[name]()
    bank, images = bank_of(backbone, scale=0.05), images_of()
    problem = make_problem(backbone=backbone, experts=bank, anchor=bank.pretrained.clone())

    def distance(flat):
        return sum(
            (call(backbone, bank.layout.unflatten(flat), images[t]) - call(backbone, bank.expert(t), images[t])).norm()
            for t in bank.tasks
        )

    assert distance(CompensatedRegression(0.01, norms=True, stem=True).solve(problem).weights) < distance(
        problem.anchor
    )


def call(backbone, weights, images):
    with torch.no_grad():
        return as_features(torch.func.functional_call(backbone, weights, (images,)))


def test_blocks_of_the_same_names_that_do_something_else_go_by_hooks():
    backbone = timm_vit(block_fn=timm.models.vision_transformer.ResPostBlock, init_values=None)
    blocks = describe(without_weights(backbone), images_of()["red"][:4], weights_of(backbone))
    assert not any(isinstance(block, Chain) for block in blocks)


@pytest.mark.parametrize("method", [CompensatedRegression(0.1), FeatCal(0.1)], ids=repr)
def test_fused_and_split_attention_agree(make_problem, method):
    fused, split = small_vit(), hugging_face(CLIPVisionModelWithProjection)
    bank = bank_of(fused)
    split.vision_model.encoder.layers[0].mlp.activation_fn = nn.GELU()
    split.vision_model.encoder.layers[1].mlp.activation_fn = nn.GELU()
    experts = {task: as_split(bank.expert(task)) for task in bank.tasks}
    names = [name for name, _ in split.named_parameters()]
    base = as_split(bank.layout.unflatten(bank.pretrained))
    other = type(bank).from_state_dicts(
        {name: base[name] for name in names}, {t: {name: e[name] for name in names} for t, e in experts.items()}
    )
    first = bank.layout.unflatten(method.solve(make_problem(experts=bank)).weights)
    second = other.layout.unflatten(method.solve(make_problem(backbone=split, experts=other)).weights)
    for name, value in as_split(first).items():
        assert torch.allclose(second[name], value, atol=1e-4), name


def as_split(weights):
    """open_clip's weights under the names of Hugging Face."""
    parts = {
        "class_embedding": "embeddings.class_embedding", "positional_embedding": "embeddings.position_embedding.weight",
        "conv1": "embeddings.patch_embedding", "ln_pre": "pre_layrnorm", "ln_post": "post_layernorm",
        "transformer.resblocks": "encoder.layers", "ln_1": "layer_norm1", "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    }  # fmt: skip
    renamed = {}
    for name, value in weights.items():
        for ours, theirs in parts.items():
            name = name.replace(ours, theirs)
        if name == "proj":
            renamed["visual_projection.weight"] = value.T.contiguous()
        elif "in_proj_" in name:
            for letter, third in zip("qkv", value.chunk(3)):
                renamed["vision_model." + name.replace("attn.in_proj_", f"self_attn.{letter}_proj.")] = third
        else:
            renamed[f"vision_model.{name}"] = value
    return renamed


def test_the_embedded_stem_is_solved_where_asked():
    encoder = build_encoder()
    blocks = describe(without_weights(encoder), torch.randn(1, 3, 32, 32), weights_of(encoder))
    assert [site.name for (site,) in blocks[0].sites] == ["conv1.0", "conv1.2", "conv1.4"]


def test_other_towers_are_layers_in_order_of_execution():
    blocks = describe(without_weights(Convolutions()), torch.zeros(2, 3, 8, 8), weights_of(Convolutions()))
    assert [site.name for block in blocks for (site,) in block.sites] == ["conv", "bn", "head"]


@pytest.mark.parametrize("method", [CompensatedRegression(1e-3), RegMean(), MaTS("block", 5)], ids=repr)
def test_running_statistics_are_those_of_the_merged_model(make_problem, method):
    backbone = Convolutions().eval()
    bank, images = bank_of(backbone), images_of()
    solution = method.solve(make_problem(backbone=backbone, experts=bank))
    inputs = torch.cat(list(images.values()))
    merged = bank.layout.unflatten(solution.weights)
    seen = nn.functional.conv2d(inputs, merged["conv.weight"], merged["conv.bias"], stride=2, padding=1)
    assert torch.allclose(solution.buffers["bn.running_mean"], seen.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(solution.buffers["bn.running_var"], seen.var((0, 2, 3)), rtol=1e-4)
    assert torch.equal(backbone.bn.running_mean, torch.zeros(4))


@pytest.mark.parametrize("method", [CompensatedRegression(0.01), RegMean()], ids=repr)
def test_a_residual_network_with_downsampling_branches(make_problem, method):
    torch.manual_seed(0)
    backbone = torchvision.models.resnet18().eval()
    backbone.layer4, backbone.fc = nn.Identity(), nn.Linear(256, 6)  # its systems of 4,608 take seconds
    bank, images = bank_of(backbone, ("red", "green"), 0.02), images_of(("red", "green"), 8)
    images = {task: nn.functional.interpolate(pixels, 32) for task, pixels in images.items()}
    problem = make_problem(backbone=backbone, experts=bank, images=images)
    solution = method.solve(problem)
    assert len(solution.buffers) == 30
    merged = bank.layout.unflatten(solution.weights) | solution.buffers
    assert all(torch.isfinite(value).all() for value in merged.values())
    if isinstance(method, CompensatedRegression):
        anchor = bank.layout.unflatten(problem.anchor)
        first, second = (
            sum((call(backbone, w, images[t]) - call(backbone, bank.expert(t), images[t])).norm() for t in bank.tasks)
            for w in (merged, anchor)
        )
        assert first < 0.3 * second


def test_inputs_that_are_always_zero_keep_the_mean(make_problem):
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(192, 6))
    bank, images = bank_of(backbone), images_of(count=300)
    for pixels in images.values():
        pixels[:, 1] = 0
    solved = RegMean().solve(make_problem(backbone=backbone, experts=bank, images=images)).weights
    mean = bank.layout.unflatten(bank.pretrained + bank.vectors.mean(0))["1.weight"]
    weight = bank.layout.unflatten(solved)["1.weight"]
    assert torch.allclose(weight[:, 64:128], mean[:, 64:128], atol=1e-6)
    assert not torch.allclose(weight[:, :64], mean[:, :64], atol=1e-3)


def test_a_convolution_is_solved_as_a_linear_map_over_patches(make_problem):
    backbone = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1, dilation=2), nn.Flatten())
    bank = bank_of(backbone, ("red",))
    problem = make_problem(backbone=backbone, experts=bank, images=images_of(("red",)), heads={})
    solved = CompensatedRegression(1e-6).solve(problem).weights
    assert torch.allclose(solved, bank.pretrained + bank.vectors[0], atol=1e-3)
