"""What a checkpoint says of itself is heard: classes, scales, prefixes, checksums, notes."""

from __future__ import annotations

import json
import logging
import math
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

import adaptive_merge as am
from adaptive_merge.adapters.heads import frozen_heads, warn_of_scales
from adaptive_merge.errors import InputError
from adaptive_merge.suites.clip_suite import _tell
from adaptive_merge.weights import check_agreement, read_head, read_weights
from adaptive_merge.weights.manifest import Manifest, Weights
from adaptive_merge.weights.text_tower import read_text_tower

from .checkpoint_helpers import MEAN, STD, assert_same, build_clip

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"image_size": 32, "patch_size": 16}


@pytest.fixture(scope="module")
def clip():
    return build_clip()


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    CLIPVisionModelWithProjection(CLIPVisionConfig(**SIZES, projection_dim=24)).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def stating(folder, **entries):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (config | entries).items() if v is not None}))
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "CLIPForImageClassification", "CLIPTextModel", "CLIPTextModelWithProjection", "SiglipModel",
        "ViTModel", "CLIPSegModel", "ChineseCLIPModel", "AltCLIPModel", "CLIPModelForTokenMerging", 7,
    ],
)  # fmt: skip
def test_other_model_classes_are_refused(folder, name):
    with pytest.raises(InputError, match=f"config.json`: architectures {name!r}, expected CLIPModel or CLIPVision"):
        read_weights(stating(folder, architectures=[name]))


@pytest.mark.parametrize("kind", ["siglip", "vit", "clipseg", "clip_text_model", "chinese_clip"])
def test_other_model_types_are_refused(folder, kind):
    with pytest.raises(InputError, match=f"model_type '{kind}'"):
        read_weights(stating(folder, architectures=None, model_type=kind))


@pytest.mark.parametrize("names", [None, [], ["CLIPModel"], ["CLIPVisionModel"], ["CLIPVisionModelWithProjection"]])
@pytest.mark.parametrize("kind", [None, "clip", "clip_vision_model"])
def test_clips_own_classes_are_read(folder, names, kind):
    assert len(read_weights(stating(folder, architectures=names, model_type=kind)).tensors) == 32


def head_file(tmp_path, **tensors):
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "head.safetensors")
    return tmp_path / "head.safetensors"


UNIT = torch.nn.functional.normalize(torch.randn(5, 24, generator=torch.Generator().manual_seed(0)), dim=-1)


@pytest.mark.parametrize(
    "weight, scale, expected",
    [
        (UNIT, math.log(100), 100 * UNIT),
        (UNIT, math.log(1 / 0.07), UNIT / 0.07),
        (UNIT, 100.0, 100 * UNIT),
        (UNIT, 0.0, UNIT),
        (UNIT, None, UNIT),
        (100 * UNIT, math.log(100), 100 * UNIT),  # applied already
        (100 * UNIT, 100.0, 100 * UNIT),
        (3 * UNIT, math.log(10), 30 * UNIT),
    ],
)
@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("prefix", ["", "head.", "module.classifier."])
def test_a_scale_beside_the_weight_is_applied(tmp_path, weight, scale, expected, shape, prefix):
    tensors = {"weight": weight} | ({} if scale is None else {"logit_scale": torch.full(shape, scale)})
    found = read_head(head_file(tmp_path, **{prefix + name: value for name, value in tensors.items()}))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [torch.tensor(math.nan), torch.tensor(math.inf), torch.ones(5), torch.zeros(0)])
def test_a_scale_that_is_none_is_refused(tmp_path, scale):
    with pytest.raises(InputError, match="tensor `logit_scale`: expected one finite number"):
        read_head(head_file(tmp_path, weight=UNIT, logit_scale=scale))


LENGTHS = {1: True, 5: True, 14.3: False, 16: False, 100: False, 900: False, 5000: True}


@pytest.mark.parametrize("length, warned", LENGTHS.items())
def test_heads_whose_rows_are_not_scaled_are_told(caplog, length, warned):
    warn_of_scales(frozen_heads({"a": length * UNIT}, ["a"], 24))
    assert ("the head of task 'a' has rows of length" in caplog.text) is warned


def test_linear_heads_have_no_scale(caplog):
    warn_of_scales(frozen_heads({"a": torch.nn.Linear(24, 5)}, ["a"], 24))
    assert not caplog.records


def test_a_module_tells_once(toy, bank, heads, caplog):
    am.TaskArithmetic(bank, toy, {task: torch.nn.functional.normalize(head, dim=-1) for task, head in heads.items()})
    assert len(caplog.records) == 3


PREFIXES = ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "model.clip.", "a.b.c."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("container", ["safetensors", "pt"])
def test_one_rule_for_prefixes_in_both_towers(tmp_path, clip, prefix, container):
    state = {prefix + name: value.clone() for name, value in clip.state_dict().items()}
    path = tmp_path / f"clip.{container}"
    save_file(state, path) if container == "safetensors" else torch.save(state, path)
    found = read_weights(path, quick_gelu=True)
    assert_same(found.tensors, {k: v for k, v in clip.visual.state_dict().items()})
    assert not found.manifest.notes
    text = read_text_tower(str(path))
    plain = clip.state_dict()
    assert len(text.tensors) == 18 and all(torch.equal(value, plain[name]) for name, value in text.tensors.items())


@pytest.mark.parametrize("part", ["visual.", "transformer.", "visual.transformer.resblocks.1."])
def test_parts_that_were_compiled_alone(tmp_path, clip, part):
    state = {
        name.replace(part, f"{part}_orig_mod.", 1) if name.startswith(part) else name: value.clone()
        for name, value in clip.state_dict().items()
    }
    torch.save(state, tmp_path / "clip.pt")
    assert_same(read_weights(tmp_path / "clip.pt", quick_gelu=True).tensors, dict(clip.visual.state_dict()))
    assert len(read_text_tower(str(tmp_path / "clip.pt")).tensors) == 18


def test_a_text_tower_of_its_own_module(tmp_path, clip):
    """open_clip's CustomTextCLIP: the tower under `text.`, the scale outside."""
    state = {
        name if name.startswith("visual.") or name == "logit_scale" else f"text.{name}": value.clone()
        for name, value in clip.state_dict().items()
    }
    torch.save(state, tmp_path / "clip.pt")
    assert torch.equal(read_text_tower(str(tmp_path / "clip.pt")).tensors["ln_final.weight"], clip.ln_final.weight)


def test_names_with_and_without_the_compilers_are_refused(tmp_path, clip):
    state = {name: value.clone() for name, value in clip.visual.state_dict().items()}
    torch.save(state | {"_orig_mod.class_embedding": state["class_embedding"]}, tmp_path / "clip.pt")
    with pytest.raises(InputError, match="both with and without `_orig_mod.`"):
        read_weights(tmp_path / "clip.pt", quick_gelu=True)


FOREIGN = ["encoder.layers.0.self_attn.q_proj.lora_A.weight", "prompts", "embeddings.prompt", "adapter.0.weight"]


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("prefix", ["", "vision_model.", "model.vision_model."])
def test_nothing_inside_a_tower_is_dropped(tmp_path, name, prefix):
    torch.manual_seed(0)
    state = CLIPVisionModel(CLIPVisionConfig(**SIZES)).state_dict()
    state = {prefix + key.removeprefix("vision_model."): value for key, value in state.items()}
    torch.save(state, tmp_path / "plain.pt")
    assert len(read_weights(tmp_path / "plain.pt", quick_gelu=True).tensors) == 31
    torch.save(state | {prefix + name: torch.ones(2, 2)}, tmp_path / "foreign.pt")
    with pytest.raises(InputError, match=f"tensor `{prefix}{name}` has no place in open_clip's tower"):
        read_weights(tmp_path / "foreign.pt", quick_gelu=True)


@pytest.mark.parametrize("name", ["prompt_learner.ctx", "visual_lora.0.weight", "head.weight"])
def test_what_is_left_outside_is_told(tmp_path, clip, name):
    torch.save({**clip.state_dict(), name: torch.ones(2)}, tmp_path / "clip.pt")
    (note,) = read_weights(tmp_path / "clip.pt", quick_gelu=True).manifest.notes
    assert note == f"not part of the image tower, dropped: {name}"


def places(path):
    """(name, first byte, bytes) of what a zip holds."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    content = path.read_bytes()
    for member in members:
        start = member.header_offset + 30
        start += sum(int.from_bytes(content[member.header_offset + at :][:2], "little") for at in (26, 28))
        yield member.filename, start, member.file_size


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9999])
@pytest.mark.parametrize("bit", [1, 64])
def test_a_flipped_bit_in_a_strangers_file_is_seen(tmp_path, clip, share, bit):
    path = tmp_path / "expert.pt"
    torch.save(clip.visual.state_dict(), path)
    _, start, size = max(places(path), key=lambda place: place[2])
    content = bytearray(path.read_bytes())
    content[start + int(size * share)] ^= bit
    path.write_bytes(content)
    with pytest.raises(InputError, match="storage of `.*`: its bytes do not match the zip's CRC-32; .* copy"):
        read_weights(path, quick_gelu=True)


def test_every_record_is_looked_at(tmp_path):
    path = tmp_path / "head.pt"
    torch.save({"weight": UNIT.clone(), "bias": torch.zeros(5)}, path)
    whole = path.read_bytes()
    for _, start, size in [place for place in places(path) if "/data/" in place[0] or place[0].endswith("data.pkl")]:
        for place in (start, start + size // 2, start + size - 1):
            content = bytearray(whole)
            content[place] ^= 2
            path.write_bytes(content)
            with pytest.raises(InputError):
                read_head(path)
    path.write_bytes(whole)
    assert torch.equal(read_head(path), UNIT)


def test_a_file_that_was_saved_without_sums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"weight": UNIT.clone()}, tmp_path / "head.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_head(tmp_path / "head.pt"), UNIT)


@pytest.mark.parametrize(
    "base, own, told",
    [
        ((MEAN, STD), (MEAN, STD), []),
        ((None, None), (MEAN, STD), []),
        ((MEAN, STD), (None, None), []),
        ((MEAN, STD), ((0.5, 0.5, 0.5), STD), ["mean"]),
        ((None, None), ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), ["mean", "std"]),
        (((0.5,) * 3, (0.5,) * 3), (MEAN, STD), ["mean", "std"]),
    ],
)
def test_an_experts_own_normalisation_is_told(clip, base, own, told):
    def weights(source, values):
        facts = dict(width=64, layers=2, patch=16, image_size=32, mlp_width=256, heads=2, quick_gelu=True, embed_dim=24)
        manifest = Manifest(source, **facts, mean=values[0], std=values[1])
        return Weights(dict(clip.visual.state_dict()), manifest)

    notes = check_agreement(weights("base", base), weights("expert", own), name="a").manifest.notes
    assert [note.split()[3] for note in notes] == told


def test_notes_are_told_once_with_all_that_they_are_about(caplog):
    caplog.set_level(logging.INFO)
    _tell({"a.pt": ["stored as float16"], "b.pt": ["stored as float16", "dropped: x"], "c.pt": []})
    assert [record.getMessage() for record in caplog.records] == [
        "`a.pt`, `b.pt`: stored as float16",
        "`b.pt`: dropped: x",
    ]


@pytest.mark.parametrize("std", [(0.0, 0.1, 0.1), (math.nan, 0.1, 0.1), (-1.0, 0.1, 0.1)])
def test_a_stated_normalisation_that_means_nothing_is_refused(folder, std):
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": list(std)}))
    with pytest.raises(InputError, match="config.json`: the std of the images is|NaN is no number of JSON"):
        read_weights(folder)
