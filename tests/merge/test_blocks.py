"""Repeated blocks, told by the names of real towers; oracles are the libraries' own module lists."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision.models as vision
from open_clip.transformer import VisionTransformer
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, ViTConfig, ViTModel

import adaptive_merge as am
from adaptive_merge.merge.blocks import blocks_by, in_depth, repeated
from adaptive_merge.report.layers import depth, readable
from adaptive_merge.transforms.lines import depth as shares


def named(model: nn.Module, prefix: str = "") -> tuple[list[str], list[int]]:
    parameters = [(prefix + name, value.dim()) for name, value in model.named_parameters()]
    return [name for name, _ in parameters], [rank for _, rank in parameters]


def meta(make):
    with torch.device("meta"):
        return make()


def on_cpu(make):
    with torch.device("cpu"):
        return make()


def listed(*places: tuple[str, int]) -> list[str]:
    return [f"{place}{number}" for place, count in places for number in range(count)]


def stages(*counts: int, outer: str = "layer", start: int = 1, inner: str = ".") -> list[str]:
    return listed(*((f"{outer}{stage}{inner}", count) for stage, count in enumerate(counts, start)))


def tiny_vit(**options):
    return vision.VisionTransformer(32, 8, 3, 2, 16, 32, **options)


HF = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=12, num_attention_heads=2, image_size=8, patch_size=4)
TIMM = timm.models
TOWERS = {
    "torchvision vit": (tiny_vit, listed(("encoder.layers.encoder_layer_", 3))),
    "torchvision vit, a conv stem": (
        lambda: tiny_vit(conv_stem_configs=[vision.vision_transformer.ConvStemConfig(8, 3, 8)]),
        listed(("encoder.layers.encoder_layer_", 3)),
    ),
    "resnet18": (vision.resnet18, stages(2, 2, 2, 2)),
    "resnet34": (vision.resnet34, stages(3, 4, 6, 3)),
    "resnet50": (vision.resnet50, stages(3, 4, 6, 3)),
    "wide resnet": (vision.wide_resnet50_2, stages(3, 4, 6, 3)),
    "timm resnet": (lambda: TIMM.resnet.resnet26(), stages(2, 2, 2, 2)),
    "swin": (
        lambda: vision.swin_t(),
        [f"features.{s}.{b}" for s, n in zip((1, 3, 5, 7), (2, 2, 6, 2)) for b in range(n)],
    ),
    "timm swin": (
        lambda: TIMM.swin_transformer.swin_tiny_patch4_window7_224(),
        stages(2, 2, 6, 2, outer="layers.", start=0, inner=".blocks."),
    ),
    "convnext": (
        lambda: vision.convnext_tiny(),
        [f"features.{s}.{b}" for s, n in zip((1, 3, 5, 7), (3, 3, 9, 3)) for b in range(n)],
    ),
    "timm convnext": (
        lambda: TIMM.convnext.convnext_tiny(),
        stages(3, 3, 9, 3, outer="stages.", start=0, inner=".blocks."),
    ),
    "efficientnet": (
        lambda: vision.efficientnet_b0(),
        [f"features.{s}.{b}" for s, n in enumerate((1, 2, 2, 3, 3, 4, 1), 1) for b in range(n)],
    ),
    "densenet": (
        lambda: vision.densenet121(),
        [f"features.denseblock{s}.denselayer{b}" for s, n in enumerate((6, 12, 24, 16), 1) for b in range(1, n + 1)],
    ),
    "regnet": (
        lambda: on_cpu(vision.regnet_y_400mf),
        [f"trunk_output.block{s}.block{s}-{b}" for s, n in enumerate((1, 3, 6, 6), 1) for b in range(n)],
    ),
    "timm vit": (
        lambda: TIMM.VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=12, num_heads=2),
        listed(("blocks.", 12)),
    ),
    "hugging face clip": (lambda: CLIPVisionModel(CLIPVisionConfig(**HF)), None),
    "hugging face vit": (lambda: ViTModel(ViTConfig(**HF)), None),
    "open_clip": (
        lambda: VisionTransformer(image_size=8, patch_size=4, width=16, layers=12, heads=2, mlp_ratio=2.0),
        listed(("transformer.resblocks.", 12)),
    ),
}


@pytest.mark.parametrize("prefix", ["", "visual.", "model.0."])
@pytest.mark.parametrize("tower", TOWERS)
def test_the_blocks_are_the_librarys_own(tower, prefix):
    make, expected = TOWERS[tower]
    model = meta(make)
    names, ranks = named(model)
    if expected is None:  # wherever this version keeps them
        home = next(name for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) == 12)
        expected = listed((f"{home}.", 12))
    expected = [prefix + block for block in expected]
    found = repeated([prefix + name for name in names], ranks)
    assert list(in_depth(found)) == expected
    for name, block in zip(names, found):  # and each parameter lies in its own
        inside = [other for other in expected if (prefix + name).startswith(f"{other}.")]
        assert [block] == (inside or [None])
    shuffled = sorted(zip(names, ranks))  # as a safetensors file gives them
    assert list(in_depth(repeated([prefix + name for name, _ in shuffled], [rank for _, rank in shuffled]))) == expected


@pytest.mark.parametrize(
    "names, expected",
    [
        (["0.weight", "0.bias", "2.weight", "2.bias"], ["0", "2"]),  # a plain stack of layers
        (["stem.weight", "blocks.0.weight", "blocks.1.weight", "head.weight"], ["blocks.0", "blocks.1"]),
        (["conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight", "fc3.weight"], []),  # LeNet
        (["weight", "bias"], []),
        ([], []),
        # An encoder of T5's: attention and MLP are halves of a block, not blocks.
        ([f"block.{i}.layer.{j}" for i in range(2) for j in ("0.attention.q.weight", "0.attention.k.weight",
          "0.attention.o.weight", "0.norm.weight", "1.mlp.wi.weight", "1.mlp.wo.weight", "1.norm.weight")],
         ["block.0", "block.1"]),
        # Of two towers the first, or the larger.
        ([f"{tower}.layers.{i}.{part}.weight" for tower in ("vision", "text") for i in range(2) for part in "ab"],
         ["vision.layers.0", "vision.layers.1"]),
        ([f"{tower}.layers.{i}.{part}.weight" for tower, n in (("text", 2), ("vision", 3)) for i in range(n)
          for part in "ab"], ["vision.layers.0", "vision.layers.1", "vision.layers.2"]),
    ],
)  # fmt: skip
def test_small_modules(names, expected):
    assert list(in_depth(repeated(names))) == expected
    assert list(in_depth(repeated(names, [2] * len(names)))) == expected


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("layer*.*", stages(2, 2, 2, 2)),
        ("layer*", ["layer1", "layer2", "layer3", "layer4"]),
        ("layer4.*", ["layer4.0", "layer4.1"]),
        ("layer1.0", ["layer1.0"]),
    ],
)
def test_a_pattern_of_ones_own(pattern, expected):
    names, _ = named(meta(vision.resnet18))
    assert list(in_depth(blocks_by(names, pattern))) == expected


@pytest.mark.parametrize("pattern", ["blocks.*", "layer", "layer*.*.*", "ayer*", "", "(", "layer1.7"])
def test_a_pattern_that_nothing_fits_says_what_there_is(pattern):
    names, _ = named(meta(vision.resnet18))
    with pytest.raises(am.InputError, match=r"no parameter lies in such a block.*layer\*\.\* \(8\)"):
        blocks_by(names, pattern)


class LeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3, padding=1)
        self.fc1, self.fc2, self.fc3 = nn.Linear(32, 8), nn.Linear(8, 8), nn.Linear(8, 6)
        self.image_mean, self.image_std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def forward(self, images):
        x = self.conv2(self.conv1(images).relu()).relu().flatten(1)
        return self.fc3(self.fc2(self.fc1(x).relu()).relu())


def bank_of(model, tasks=("red", "green", "blue")):
    torch.manual_seed(0)
    state = dict(model.named_parameters())
    experts = {task: {k: v + 0.1 * torch.randn_like(v) for k, v in state.items()} for task in tasks}
    return am.TaskVectors.from_state_dicts(state, experts)


NEED_BLOCKS = {
    "BlockWise": lambda bank: am.BlockWise().bind(bank),
    "LiNeS": lambda bank: am.LiNeS()(bank),
    "DOGE": lambda bank: am.DOGE()(bank),
}


@pytest.mark.parametrize("method", NEED_BLOCKS)
def test_without_blocks_the_message_lists_what_is_numbered(method):
    bank = bank_of(LeNet())
    with pytest.raises(am.InputError, match=r"repeated blocks.*conv\* \(2\), fc\* \(3\); name its blocks with"):
        NEED_BLOCKS[method](bank)
    assert NEED_BLOCKS[method](bank.with_blocks("fc*")) is not None


def test_blocks_of_ones_own_go_through_the_whole_method(heads, images):
    bank, model = bank_of(LeNet()), LeNet()
    module = am.AdaptiveMerge(bank, model, heads, coefficients=am.BlockWise(), transforms=[am.LiNeS()], blocks="fc*")
    assert module.coefficients.groups == ("before", "fc1", "fc2", "fc3")
    assert module.method["blocks"] == "fc*"
    with pytest.raises(am.InputError, match="needs tokens"):
        wrong = am.AdaptiveMerge(bank, model, heads, adapters=[am.BlockSurgery(2)], blocks="conv2")
        wrong("red", images["red"].take(torch.arange(4)))


def test_a_bank_file_keeps_the_pattern(tmp_path):
    bank = bank_of(LeNet()).with_blocks("fc*")
    bank.save(tmp_path / "bank.safetensors")
    assert am.TaskVectors.load(tmp_path / "bank.safetensors").layout == bank.layout


def test_lines_goes_by_depth_and_not_by_the_order_of_the_names():
    names = sorted(f"blocks.{i}.{part}.weight" for i in range(12) for part in ("norm1", "attn", "mlp"))
    layout = am.merge.layout.Layout(tuple(names), ((2, 2),) * len(names))
    assert all(share == int(name.split(".")[1]) / 11 for name, share in zip(names, shares(layout)))


def tower_with_head(make, width):
    model = make()
    model.image_mean, model.image_std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    return model.eval()


def test_surgery_operates_on_torchvisions_blocks():
    """SurgeryV2 on a ViT of torchvision's: as hooks on its own encoder layers do it."""
    torch.manual_seed(0)
    model = tower_with_head(tiny_vit, 16)
    model.heads = nn.Identity()
    bank = bank_of(model, ("a", "b"))
    heads = {task: torch.randn(4, 16) for task in "ab"}
    module = am.SurgeryV2(bank, model, heads, rank=3)
    adapter = module.model.adapters[0]
    assert adapter.depth == 3 and adapter.block_down[0].shape == (3, 16)
    with torch.no_grad():
        for value in adapter.block_up:
            value.normal_(0, 0.3)
    images = torch.randn(5, 3, 32, 32)
    model.load_state_dict(module.merged_state_dict())
    for index, layer in enumerate(model.encoder.layers):
        down, up = adapter.block_down[3 + index], adapter.block_up[3 + index]
        layer.register_forward_hook(lambda _, __, z, down=down, up=up: z - (z @ down.T).relu() @ up.T)
    with torch.no_grad():
        torch.testing.assert_close(module.model("b", images).features, model(images))


def test_surgery_operates_on_hugging_faces_blocks():
    torch.manual_seed(0)

    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = CLIPVisionModel(CLIPVisionConfig(**HF | {"num_hidden_layers": 2}))

        def forward(self, images):
            return self.model(images).pooler_output

    model = Tower().eval()
    module = am.SurgeryV2(bank_of(model, ("a", "b")), model, {task: torch.randn(4, 16) for task in "ab"}, rank=3)
    images = torch.randn(2, 3, 8, 8)
    before = module.model("a", images).features
    with torch.no_grad():
        for value in module.model.adapters[0].block_up:
            value.normal_(0, 0.3)
    assert not torch.allclose(module.model("a", images).features, before)


def test_surgery_says_why_it_cannot_operate_on_a_resnet():
    model = tower_with_head(vision.resnet18, 1000)
    state = model.state_dict()
    bank = am.TaskVectors.from_state_dicts(state, {"a": state}, buffers=[name for name, _ in model.named_buffers()])
    with pytest.raises(am.InputError, match="blocks of one width, this backbone has layer1.0 64, .*layer4.1 512"):
        am.SurgeryV2(bank, model, {"a": torch.randn(4, 1000)}, rank=3)


def test_reports_read_the_same_blocks():
    names, _ = named(meta(vision.resnet18))
    labels, stage = depth(names)
    assert labels == ["stem", "1.0", "1.1", "2.0", "2.1", "3.0", "3.1", "4.0", "4.1", "end"]
    assert labels[stage[names.index("layer3.1.conv2.weight")]] == "3.1"
    assert readable(names)[names.index("layer3.1.conv2.weight")] == "3.1 · conv2"
    names, _ = named(meta(tiny_vit))
    assert depth(names)[0] == ["stem", "0", "1", "2", "end"]
    assert "2 · mlp.3" in readable(names)
