"""`data check` looks at checkpoints by their headers: each broken suite is named, and no number is read."""

from __future__ import annotations

import json
import re
import resource
import struct

import open_clip
import pytest
import torch
from data.data_sets import save
from safetensors.torch import save_file

from adaptive_merge.errors import InputError
from adaptive_merge.suites.check import check_suite
from adaptive_merge.weights import read_weights, torch_files
from adaptive_merge.weights.huggingface_names import to_huggingface
from adaptive_merge.weights.open_clip_names import expected_shapes

VISION = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32}
TEXT = {"context_length": 8, "vocab_size": 40, "width": 64, "heads": 1, "layers": 1}
CONFIG = {"embed_dim": 24, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT}
Q_PROJ = "base_model.model.vision_model.encoder.layers.{}.self_attn.q_proj.lora_{}.weight"


def tower(**vision) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = open_clip.CLIP(24, VISION | vision, TEXT, quick_gelu=True)
    return {name: tensor.detach().contiguous() for name, tensor in model.visual.state_dict().items()}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A pre-trained CLIP, and one task's images in two classes."""
    folder = tmp_path_factory.mktemp("check")
    (folder / "architecture.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(0)
    torch.save(open_clip.CLIP(24, VISION, TEXT, quick_gelu=True).state_dict(), folder / "pretrained.pt")
    for index in range(2):
        save(folder / "birds" / ("owl", "jay")[index] / f"{index}.png", index)
    return folder


@pytest.fixture
def problem(material, tmp_path):
    """The first problem of a suite of one task, of which the rest is right."""

    def check(**changes) -> str | None:
        save_file(tower(), tmp_path / "expert.safetensors")
        content = {
            **{"kind": "clip", "tasks": ["birds"], "folders": {"birds": f"{material}/birds"}, "sizes": "any"},
            **{"architecture": f"{material}/architecture.json", "pretrained": f"{material}/pretrained.pt"},
            "experts": {"birds": "expert.safetensors"},
        }
        (tmp_path / "suite.json").write_text(json.dumps(content | changes))
        (row,) = check_suite(str(tmp_path))
        assert row.images == 2 and row.classes == 2
        return row.problem

    return check


def adapter(folder, width=64, layer=0, ranks=(2, 2)) -> dict[str, str]:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    factors = {"A": torch.ones(ranks[0], width), "B": torch.ones(width, ranks[1])}
    save_file(
        {Q_PROJ.format(layer, kind): value for kind, value in factors.items()}, folder / "adapter_model.safetensors"
    )
    return {"birds": folder.name}


def hugging_face(folder, tensors, **config) -> dict[str, str]:
    folder.mkdir()
    save_file(to_huggingface(tensors), folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps({"hidden_size": 64, "image_size": 32, "num_attention_heads": 2} | config)
    )
    return {"birds": folder.name}


def test_what_fits_has_no_problem(problem, tmp_path):
    assert problem() is None
    torch.save({f"visual.{name}": value for name, value in tower().items()}, tmp_path / "expert.pt")
    assert problem(experts={"birds": "expert.pt"}) is None
    assert problem(experts=hugging_face(tmp_path / "whole", tower())) is None
    frozen = {name: value for name, value in tower().items() if name != "proj"}
    assert problem(experts=hugging_face(tmp_path / "tower", frozen)) is None
    assert problem(experts=adapter(tmp_path / "adapter")) is None
    save_file({"weight": torch.zeros(2, 24), "logit_scale": torch.tensor(4.6)}, tmp_path / "head.safetensors")
    assert problem(heads={"birds": "head.safetensors"}) is None
    assert problem(experts={"birds": "hf-hub:nobody/nothing"}) is None  # not downloaded


def transposed(tensors):
    name = "transformer.resblocks.1.mlp.c_fc.weight"
    return tensors | {name: tensors[name].t().contiguous()}


def without(name, tensors):
    return {key: value for key, value in tensors.items() if key != name}


EXPERTS = {
    "another width": (lambda: tower(width=96), "does not fit `.*pretrained.pt`: width: expected 64, found 96"),
    "more layers": (lambda: tower(layers=3), "layers: expected 2, found 3"),
    "other patches": (lambda: tower(patch_size=8), "patch: expected 16, found 8"),
    "transposed": (lambda: transposed(tower()), r"resblocks.1.mlp.c_fc.weight.*expected shape \(256, 64\).*transposed"),
    "a tensor missing": (lambda: without("ln_post.bias", tower()), "1 tensors missing, first `ln_post.bias`"),
    "a projection lost": (lambda: without("proj", tower()), "`proj`: expected .* its fine-tuned projection is lost"),
    "no tower": (lambda: {"weight": torch.zeros(2)}, "no tensor `class_embedding`"),
    "quantised": (lambda: tower() | {"ln_post.bias": torch.zeros(64, dtype=torch.int8)}, "undo the quantisation"),
    "two layouts": (
        lambda: without("vision_model.pre_layrnorm.bias", to_huggingface(tower())) | {"ln_pre.bias": torch.zeros(64)},
        "1 tensors missing, first `ln_pre.bias`",
    ),
}


@pytest.mark.parametrize("case", EXPERTS)
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_experts_that_do_not_fit(problem, tmp_path, case, suffix):
    tensors, message = EXPERTS[case]
    path = tmp_path / f"other.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(tensors(), path)
    first = problem(experts={"birds": path.name})
    assert first is not None and path.name in first
    assert re.search(message, first), first


BROKEN = {
    "no such expert": (lambda folder: {"experts": {"birds": "gone.pt"}}, "gone.pt`: the expert of task 'birds' is not"),
    "no such base": (lambda folder: {"pretrained": "gone.pt"}, "gone.pt`: pretrained is not there"),
    "another architecture": (lambda folder: {"architecture": "ViT-B-32-quickgelu"}, "width: expected 768, found 64"),
    "adapter of a wider base": (
        lambda folder: {"experts": adapter(folder / "a", width=96)},
        r"\(96, 96\).*give the base",
    ),
    "adapter of a deeper base": (lambda folder: {"experts": adapter(folder / "a", layer=7)}, "layers.7.* has no place"),
    "factors apart": (lambda folder: {"experts": adapter(folder / "a", ranks=(2, 3))}, "factors of ranks 3 and 2"),
    "another activation": (
        lambda folder: {"experts": hugging_face(folder / "a", tower(), hidden_act="gelu")},
        "QuickGELU: expected True, found False",
    ),
    "a head of other classes": (lambda folder: {"heads": head(folder, 3, 24)}, "expected 2 classes .* found 3"),
    "a head of another width": (lambda folder: {"heads": head(folder, 2, 32)}, r"\(2, 32\), expected \[classes, 24\]"),
    "no head": (lambda folder: {"heads": {"birds": "gone.pt"}}, "gone.pt`: the head of task 'birds' is not there"),
    "no text tower": (lambda folder: {"text": "expert.safetensors"}, "expert.safetensors.*text tower"),
    "no folder of a known form": (lambda folder: {"experts": {"birds": "."}}, "expected .*adapter_config.json"),
}


def head(folder, classes, width) -> dict[str, str]:
    torch.save({"weight": torch.zeros(classes, width), "bias": torch.zeros(classes)}, folder / "head.pt")
    return {"birds": "head.pt"}


@pytest.mark.parametrize("case", BROKEN)
def test_suites_that_cannot_be_used(problem, tmp_path, case):
    changes, message = BROKEN[case]
    first = problem(**changes(tmp_path))
    assert first is not None and re.search(message, first), first


def sparse(path, **sizes) -> None:
    """A safetensors file of a tower whose numbers are a hole of gigabytes."""
    header, offset = {}, 0
    for name, shape in expected_shapes(**sizes).items():
        size = 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": (offset, offset + size)}
        offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)


def test_ten_gigabytes_are_not_read(problem, tmp_path):
    vision = VISION | {"width": 4096, "layers": 12, "head_width": 64}
    (tmp_path / "wide.json").write_text(json.dumps(CONFIG | {"vision_cfg": vision}))
    sizes = {"width": 4096, "patch": 16, "image_size": 32, "mlp_width": 16384, "embed_dim": 24}
    sparse(tmp_path / "base.safetensors", layers=12, **sizes)
    sparse(tmp_path / "other.safetensors", layers=12, **sizes)
    assert (tmp_path / "base.safetensors").stat().st_size > 9 << 30
    save_file({"weight": torch.zeros(2, 24)}, tmp_path / "head.safetensors")
    wide = {"architecture": "wide.json", "pretrained": "base.safetensors", "heads": {"birds": "head.safetensors"}}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert problem(**wide, experts={"birds": "other.safetensors"}) is None
    # What is read of a mapped file counts as resident.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20


def test_numbers_of_torch_files_are_not_touched(problem, material, tmp_path, monkeypatch):
    """Damaged numbers show in a checksum when they are read: the check does not, the reading does."""
    path = tmp_path / "other.pt"
    torch.save(tower(), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)

    def refuse(*_):
        raise AssertionError("numbers were read")

    monkeypatch.setattr(torch_files, "_from_bytes", refuse)
    assert problem(experts={"birds": "other.pt"}) is None
    monkeypatch.undo()
    with pytest.raises(InputError, match="CRC-32"):
        read_weights(path)
