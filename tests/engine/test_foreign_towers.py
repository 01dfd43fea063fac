"""Towers of other libraries as they are: every expert says what it says by itself, and merges learn on all."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import perturbed
from fitting import fit
from torch import nn

import adaptive_merge as am

CLASSES = {"red": 3, "blue": 5}


def torchvision_vit():
    models = pytest.importorskip("torchvision.models")
    tower = models.VisionTransformer(32, 8, 2, 2, 32, 64)
    tower.heads = nn.Identity()
    return tower


def torchvision_convnext():
    models = pytest.importorskip("torchvision.models")
    layers = [models.convnext.CNBlockConfig(16, 32, 2), models.convnext.CNBlockConfig(32, None, 1)]
    tower = models.ConvNeXt(layers)
    tower.classifier = nn.Flatten()
    return tower


def timm_vit():
    timm = pytest.importorskip("timm")
    return timm.models.vision_transformer.VisionTransformer(32, 8, num_classes=0, embed_dim=32, depth=2, num_heads=2)


def timm_siglip():
    timm = pytest.importorskip("timm")
    settings = {"num_classes": 0, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return timm.models.vision_transformer.VisionTransformer(32, 8, class_token=False, global_pool="map", **settings)


def timm_dinov2():
    timm = pytest.importorskip("timm")
    settings = {"num_classes": 0, "embed_dim": 32, "depth": 2, "num_heads": 2, "init_values": 1e-1}
    return timm.models.vision_transformer.VisionTransformer(32, 8, reg_tokens=4, no_embed_class=True, **settings)


def huggingface(kind, settings):
    library = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    return getattr(library, kind)(getattr(library, settings)(**sizes))


TOWERS = {
    "torchvision ViT": torchvision_vit,
    "torchvision ConvNeXt": torchvision_convnext,
    "timm ViT": timm_vit,
    "timm SigLIP": timm_siglip,
    "timm DINOv2 with registers": timm_dinov2,
    "HF CLIP with projection": lambda: huggingface("CLIPVisionModelWithProjection", "CLIPVisionConfig"),
    "HF CLIP": lambda: huggingface("CLIPVisionModel", "CLIPVisionConfig"),
    "HF DINOv2": lambda: huggingface("Dinov2Model", "Dinov2Config"),
    "HF SigLIP": lambda: huggingface("SiglipVisionModel", "SiglipVisionConfig"),
}


def features_of(output):
    """As a user of the library takes them."""
    if isinstance(output, torch.Tensor):
        return output
    return output.image_embeds if "image_embeds" in output else output.pooler_output


@pytest.fixture
def stream():
    generator = torch.Generator().manual_seed(0)
    return {
        task: am.Images(
            torch.randint(0, 256, (12, 32, 32, 3), generator=generator, dtype=torch.uint8),
            torch.randint(0, classes, (12,), generator=generator),
            [str(index) for index in range(classes)],
        )
        for task, classes in CLASSES.items()
    }


@pytest.mark.parametrize("name", TOWERS)
def test_each_expert_says_what_it_says_by_itself(name, stream):
    torch.manual_seed(0)
    tower = TOWERS[name]().eval()
    tower.image_mean, tower.image_std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    states = {task: perturbed(tower.state_dict(), seed, 0.05) for seed, task in enumerate(CLASSES)}
    buffers = [name for name, _ in tower.named_buffers()]
    bank = am.TaskVectors.from_state_dicts(tower.state_dict(), states, buffers=buffers)
    pixels = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        width = features_of(tower(pixels)).shape[1]
    heads = {task: nn.Linear(width, classes) for task, classes in CLASSES.items()}
    module = am.AdaMerging(bank, tower, heads, accumulate="joint")
    for task, images in stream.items():
        alone = copy.deepcopy(tower)
        alone.load_state_dict(states[task])
        uint8 = images.take(torch.arange(12))
        normalised = (uint8.float() / 255 - torch.tensor(tower.image_mean).view(-1, 1, 1)) / torch.tensor(
            tower.image_std
        ).view(-1, 1, 1)
        with torch.no_grad():
            expected = heads[task](features_of(alone(normalised)))
            said = module.views.expert(task, {"image": uint8}, None).logits
        assert torch.allclose(said, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
        assert torch.equal(said.argmax(-1), expected.argmax(-1))
    before = module.coefficients.values.detach().clone()
    fit(module, stream, steps=2)
    assert not torch.equal(module.coefficients.values, before)


@pytest.mark.parametrize("name", [name for name in TOWERS if "ConvNeXt" not in name])
def test_blocks_are_those_of_the_transformer(name, stream):
    tower = TOWERS[name]()
    bank = am.TaskVectors.from_state_dicts(tower.state_dict(), {"red": perturbed(tower.state_dict(), 0, 0.05)})
    blocks = dict.fromkeys(block for block in bank.layout.blocks if block)
    assert len(blocks) == 2, blocks
    for block in blocks:
        inside = tower.get_submodule(block)
        assert any("attn" in part or "attention" in part for part, _ in inside.named_parameters()), block


def test_an_output_without_features_is_told(toy, bank, heads):
    class Odd(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.add_module("inner", inner)

        def forward(self, images):
            return {"tokens": self.inner(images)}

    tower = Odd(toy)
    state = {f"inner.{name}": value for name, value in toy.state_dict().items()}
    odd = am.TaskVectors.from_state_dicts(state, {"red": perturbed(state, 0)})
    merged = am.MergedBackbone(tower, odd, am.Fixed(0.3))
    with pytest.raises(am.InputError, match="gives a dict, expected features"):
        merged(torch.zeros(1, 3, 4, 4))
