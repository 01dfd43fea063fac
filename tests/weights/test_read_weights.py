"""Every published form of a CLIP tower reads to the same tensors; what cannot be read says why."""

from __future__ import annotations

import json
import os

import pytest
import torch
from open_clip.transformer import VisionTransformer
from safetensors.torch import save_file

from adaptive_merge.errors import InputError, MissingFileError
from adaptive_merge.weights import Manifest, read_weights
from adaptive_merge.weights.open_clip_names import parameter_names
from weights.checkpoint_helpers import FORMATS, MEAN, STD, TOWER, assert_same, build_clip, write

TEXT = {"positional_embedding", "text_projection", "logit_scale", "token_embedding.weight"}


@pytest.mark.parametrize("kind", FORMATS)
def test_whole_pickled_encoders_are_read_bit_for_bit(tmp_path, clip, tower, encoder, strangers, kind):
    path = write(encoder(clip), tmp_path / "finetuned.pt", kind)
    del strangers["src.modeling"], strangers["src"]
    found = read_weights(path)
    assert_same(found.tensors, tower)
    assert found.manifest.quick_gelu is True
    assert (found.manifest.mean, found.manifest.std, found.manifest.heads) == (MEAN, STD, 2)
    assert {f"model.{name}" for name in TEXT} <= set(found.manifest.dropped)


def test_the_activation_of_a_whole_pickle_is_read_from_its_modules(tmp_path, encoder):
    path = write(encoder(build_clip(quick_gelu=False)), tmp_path / "gelu.pt", "zip")
    assert read_weights(path).manifest.quick_gelu is False


@pytest.mark.parametrize("kind", ["zip", "legacy"])
@pytest.mark.parametrize("prefix", ["", "visual.", "model.visual.", "module.visual.", "image_encoder.model.visual."])
def test_state_dicts_are_read_whatever_their_prefix(tmp_path, tower, prefix, kind):
    path = write({prefix + name: tensor for name, tensor in tower.items()}, tmp_path / "weights.pt", kind)
    assert_same(read_weights(path).tensors, tower)


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_wrapped_state_dicts_are_unwrapped(tmp_path, tower, wrapper):
    path = write({"epoch": 3, wrapper: tower, "optimizer": {"lr": 1e-5}}, tmp_path / "epoch.ckpt", "zip")
    assert_same(read_weights(path).tensors, tower)


def test_a_whole_clip_loses_its_text_side_and_the_manifest_names_it(tmp_path, clip, tower):
    save_file({name: tensor.contiguous() for name, tensor in clip.state_dict().items()}, tmp_path / "clip.safetensors")
    found = read_weights(tmp_path / "clip.safetensors")
    assert_same(found.tensors, tower)
    assert set(found.manifest.dropped) >= TEXT
    assert found.manifest.quick_gelu is None


def test_the_manifest_tells_the_architecture(tmp_path, tower):
    save_file(tower, tmp_path / "tower.safetensors")
    found = read_weights(tmp_path / "tower.safetensors", quick_gelu=True).manifest
    assert found.architecture() == {"width": 64, "layers": 2, "patch": 16, "image_size": 32, "mlp_width": 256}
    assert (found.embed_dim, found.quick_gelu, found.projection, found.dtype) == (24, True, "present", "float32")
    assert len(found.sha256) == 64


def test_a_manifest_in_our_own_file_states_the_activation(tmp_path, tower):
    save_file(tower, tmp_path / "bare.safetensors")
    manifest = read_weights(tmp_path / "bare.safetensors", quick_gelu=True).manifest
    save_file(tower, tmp_path / "ours.safetensors", metadata=manifest.to_metadata())
    assert read_weights(tmp_path / "ours.safetensors").manifest.quick_gelu is True
    with pytest.raises(InputError, match="ours.*does not fit `quick_gelu=`: QuickGELU: expected False, found True"):
        read_weights(tmp_path / "ours.safetensors", quick_gelu=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_cast_and_noted(tmp_path, tower, dtype):
    save_file({name: tensor.to(dtype) for name, tensor in tower.items()}, tmp_path / "half.safetensors")
    found = read_weights(tmp_path / "half.safetensors")
    assert_same(found.tensors, {name: tensor.to(dtype).float() for name, tensor in tower.items()})
    assert "cast to float32" in found.manifest.notes[0]


def test_split_attention_is_joined(tmp_path, tower):
    split = dict(tower)
    for index in range(2):
        for kind in ("weight", "bias"):
            parts = split.pop(f"transformer.resblocks.{index}.attn.in_proj_{kind}").chunk(3)
            for letter, part in zip("qkv", parts):
                split[f"transformer.resblocks.{index}.attn.{letter}_proj.{kind}"] = part.contiguous()
    save_file(split, tmp_path / "split.safetensors")
    assert_same(read_weights(tmp_path / "split.safetensors").tensors, tower)
    del split["transformer.resblocks.1.attn.k_proj.bias"]
    save_file(split, tmp_path / "lost.safetensors")
    with pytest.raises(InputError, match="cannot join q, k, v into `transformer.resblocks.1.attn.in_proj_bias`"):
        read_weights(tmp_path / "lost.safetensors")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not hasattr(torch, "jit"), reason="this torch writes no TorchScript archives")
def test_a_torchscript_archive_gives_its_tensors_and_runs_no_code(tmp_path, clip, tower):
    images = torch.zeros(1, 3, 32, 32)
    holder = torch.nn.Module()
    holder.visual = clip.visual
    holder.forward = clip.visual.forward
    torch.jit.trace_module(holder, {"forward": images}, check_trace=False).save(tmp_path / "clip.pt")
    found = read_weights(tmp_path / "clip.pt")
    assert found.manifest.format.startswith("TorchScript")
    assert_same(found.tensors, tower)


def open_clip_folder(folder, clip, **model):
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in clip.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    config = {"model_cfg": {**TOWER, **model}, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("form", ["{}", "local-dir:{}", "{}/open_clip_model.safetensors"])
def test_open_clip_folders(tmp_path, clip, tower, form):
    folder = open_clip_folder(tmp_path / "model", clip, quick_gelu=True)
    found = read_weights(form.format(folder))
    assert_same(found.tensors, tower)
    assert (found.manifest.format, found.manifest.quick_gelu, found.manifest.mean) == ("open_clip", True, MEAN)


def test_an_open_clip_folder_without_the_key_is_plain_gelu(tmp_path, clip):
    assert read_weights(open_clip_folder(tmp_path / "model", clip)).manifest.quick_gelu is False


@pytest.mark.parametrize("vision", [{"timm_model_name": "vit_base"}, {"layers": [3, 4, 6, 3]}, {"pool_type": "avg"}])
def test_open_clip_towers_of_another_kind_are_refused(tmp_path, clip, vision):
    folder = open_clip_folder(tmp_path / "model", clip, vision_cfg={**TOWER["vision_cfg"], **vision})
    with pytest.raises(InputError, match=f"open_clip_config.json.*{next(iter(vision))}"):
        read_weights(folder)


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="this system has no symbolic links")
def test_links_that_lead_out_of_a_folder_are_refused(tmp_path, clip):
    folder = open_clip_folder(tmp_path / "model", clip)
    (folder / "open_clip_model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "open_clip_model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(InputError, match="a link that leads out of"):
        read_weights(f"local-dir:{folder}")


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="this system has no symbolic links")
def test_links_inside_the_hub_cache_are_followed(tmp_path, clip, tower):
    repository = tmp_path / "models--org--name"
    folder = open_clip_folder(repository / "snapshots" / "abc123", clip)
    (repository / "blobs").mkdir()
    (folder / "open_clip_model.safetensors").rename(repository / "blobs" / "77")
    (folder / "open_clip_model.safetensors").symlink_to(repository / "blobs" / "77")
    assert_same(read_weights(folder).tensors, tower)


def test_hub_ids_go_through_the_hub_with_their_revision(tmp_path, clip, tower, monkeypatch):
    folder, asked = open_clip_folder(tmp_path / "abc123", clip), []
    fake = lambda name, revision=None, allow_patterns=None: asked.append((name, revision)) or str(folder)  # noqa: E731
    monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
    found = read_weights("hf-hub:org/name@v1")
    assert_same(found.tensors, tower)
    assert (found.manifest.revision, found.manifest.notes) == ("abc123", ())
    assert "revision not pinned" in read_weights("org/name").manifest.notes[0]
    assert asked == [("org/name", "v1"), ("org/name", None)]


def test_an_offline_hub_is_one_readable_error(monkeypatch):
    def offline(*_, **__):
        raise OSError("offline mode is on\nlong explanation")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(MissingFileError, match=r"`org/name` \(revision main\): cannot be had.*offline mode is on"):
        read_weights("org/name")


def test_a_misspelt_path_suggests_the_right_one(tmp_path):
    (tmp_path / "finetuned.pt").write_bytes(b"x")
    with pytest.raises(MissingFileError, match="finetunned.pt.*did you mean 'finetuned.pt'"):
        read_weights(tmp_path / "finetunned.pt")


def broken(tower, name, change):
    return {**tower, name: change(tower[name])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != "ln_post.bias"}, "1 tensors missing, first `ln_post.bias`"),
        (lambda t: {**t, "adapter.weight": t["proj"]}, "first `adapter.weight`"),
        (
            lambda t: broken(t, "proj", lambda p: p.t().contiguous()),
            r"`proj`: expected shape \(64, 64\), found \(24, 64\)",
        ),
        (
            lambda t: broken(t, "transformer.resblocks.0.mlp.c_proj.weight", lambda p: p.t().contiguous()),
            r"c_proj.weight`: expected shape \(64, 256\), found \(256, 64\); it is transposed",
        ),
        (lambda t: broken(t, "proj", lambda p: torch.tensor(1.0)), "`proj`: expected 2 dimensions"),
        (lambda t: broken(t, "ln_pre.weight", lambda p: p[:5].clone()), r"`ln_pre.weight`: expected shape \(64,\)"),
        (
            lambda t: broken(t, "conv1.weight", lambda p: p.clone().fill_(float("nan"))),
            "`conv1.weight`: 49152 of 49152",
        ),
        (lambda t: broken(t, "proj", lambda p: p.clone().index_fill_(0, torch.tensor(3), torch.inf)), "`proj`: 24 of"),
        (lambda t: broken(t, "proj", lambda p: p.to(torch.int32)), "`proj`: expected floating-point numbers"),
        (lambda t: {k: v for k, v in t.items() if "embedding" not in k}, "no tensor `class_embedding`"),
        (lambda t: {**t, **{f"other.{k}": v for k, v in t.items()}}, "2 image towers in one file"),
    ],
)
def test_broken_towers_are_named(tmp_path, tower, change, message):
    path = tmp_path / "broken.safetensors"
    save_file({name: tensor.clone() for name, tensor in change(tower).items()}, path)
    with pytest.raises(InputError, match=message) as caught:
        read_weights(path)
    assert str(path) in str(caught.value)


def test_a_folder_of_unknown_layout_lists_what_is_expected(tmp_path):
    (tmp_path / "weights.txt").write_text("")
    with pytest.raises(InputError, match="expected open_clip_config.json with open_clip_model.safetensors"):
        read_weights(tmp_path)


@pytest.mark.parametrize(("width", "layers", "patch"), [(768, 12, 32), (768, 12, 16), (1024, 24, 14)])
def test_names_are_those_of_open_clip_in_its_order(width, layers, patch):
    with torch.device("meta"):
        real = VisionTransformer(224, patch, width, layers, width // 64, 4.0)
    assert parameter_names(layers) == [name for name, _ in real.named_parameters()]
    assert len(parameter_names(layers)) == {12: 152, 24: 296}[layers]


def test_a_manifest_is_frozen(tmp_path, tower):
    save_file(tower, tmp_path / "tower.safetensors")
    manifest = read_weights(tmp_path / "tower.safetensors").manifest
    assert isinstance(manifest, Manifest)
    with pytest.raises(AttributeError):
        manifest.quick_gelu = True
