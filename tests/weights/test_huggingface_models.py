"""Hugging Face folders: the same features as transformers gives, for every model class and layout."""

from __future__ import annotations

import json

import pytest
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from safetensors.torch import load_file, save_file

from adaptive_merge.errors import InputError, MissingFileError
from adaptive_merge.weights import read_weights
from adaptive_merge.weights.huggingface import to_huggingface
from weights.checkpoint_helpers import MEAN, STD, assert_same, write

VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 48,
    "patch_size": 16,
    "projection_dim": 24,
}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}


def transformers():
    return pytest.importorskip("transformers", reason="transformers is a test extra and is not installed")


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
    return model.eval()


def vision_model(projection: bool, activation: str = "quick_gelu"):
    library = transformers()
    kind = library.CLIPVisionModelWithProjection if projection else library.CLIPVisionModel
    return randomised(kind(library.CLIPVisionConfig(**VISION, hidden_act=activation)))


def tower_of(weights, *, output_tokens: bool = False) -> VisionTransformer:
    facts = weights.manifest
    tower = VisionTransformer(
        facts.image_size,
        facts.patch,
        facts.width,
        facts.layers,
        facts.heads,
        facts.mlp_width / facts.width,
        output_dim=facts.embed_dim or 8,
        act_layer=QuickGELU if facts.quick_gelu else torch.nn.GELU,
    ).eval()
    if facts.projection == "absent":
        tower.proj = None
    tower.load_state_dict(weights.tensors)
    return tower


@pytest.fixture
def images():
    return torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_features_with_projection_are_those_of_transformers(tmp_path, images, activation):
    model = vision_model(True, activation)
    model.save_pretrained(tmp_path)
    weights = read_weights(tmp_path)
    assert weights.manifest.quick_gelu is (activation == "quick_gelu")
    with torch.no_grad():
        difference = (tower_of(weights)(images) - model(images).image_embeds).abs().max()
    assert difference <= 1e-5


def test_the_other_activation_would_have_been_noticed(tmp_path, images):
    """The control: with the wrong activation the same comparison fails, so it can."""
    model = vision_model(True, "gelu")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": "quick_gelu"}))
    with torch.no_grad():
        assert (tower_of(read_weights(tmp_path))(images) - model(images).image_embeds).abs().max() > 1e-3


def test_a_vision_model_without_projection_gives_its_pooled_features(tmp_path, images):
    model = vision_model(False)
    model.save_pretrained(tmp_path)
    weights = read_weights(tmp_path)
    assert weights.manifest.projection == "absent"
    with torch.no_grad():
        assert (tower_of(weights)(images) - model(images).pooler_output).abs().max() <= 1e-5


def test_a_whole_clip_model_in_shards(tmp_path, images):
    library = transformers()
    config = library.CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=24)
    model = randomised(library.CLIPModel(config))
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    weights = read_weights(tmp_path)
    assert any(name.startswith("text_model.") for name in weights.manifest.dropped)
    with torch.no_grad():
        theirs = model.visual_projection(model.vision_model(images).pooler_output)
        assert (tower_of(weights)(images) - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize("projection", [True, False])
def test_the_way_back_is_what_transformers_loads(tmp_path, projection):
    model = vision_model(projection)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in stored) else ""
    back = to_huggingface(read_weights(tmp_path).tensors, prefix=prefix)
    assert back.keys() == stored.keys()
    assert all(torch.equal(back[name], stored[name]) for name in stored)


# From here on without transformers: our own map makes the file, so its two directions are tested together.


@pytest.fixture
def folder(tmp_path, tower):
    save_file(to_huggingface(tower), tmp_path / "model.safetensors")
    config = {"hidden_act": "quick_gelu", "num_attention_heads": 2, "image_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return tmp_path


def test_there_and_back_without_a_difference(folder, tower):
    found = read_weights(folder)
    assert_same(found.tensors, tower)
    assert (found.manifest.mean, found.manifest.std) == (MEAN, STD)
    assert_same(read_weights(folder / "model.safetensors").tensors, tower)


def test_older_folders_with_a_pickled_state_dict(folder, tower):
    state = load_file(folder / "model.safetensors")
    state["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    write(state, folder / "pytorch_model.bin", "zip")
    (folder / "model.safetensors").unlink()
    assert_same(read_weights(folder).tensors, tower)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu_new"}, "hidden_act 'gelu_new', expected one of"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps 1e-06, expected 1e-05"),
        ({"image_size": 224}, "does not fit `.*config.json`: image_size: expected 224, found 32"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(folder, change, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError, match=message):
        read_weights(folder)


def test_adapters_that_were_not_folded_in_are_refused(folder):
    state = load_file(folder / "model.safetensors")
    state["vision_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 64)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(InputError, match="lora_A.weight` has no place"):
        read_weights(folder)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ({"weight_map": {"a": "../../secret.safetensors"}}, InputError, "should name files beside it"),
        ({"weight_map": {"a": "model-2.safetensors"}}, MissingFileError, "named in model.safetensors.index.json"),
        ({"metadata": {}}, InputError, "should name files beside it"),
    ],
)
def test_shard_indices_that_lead_astray_are_refused(folder, index, error, message):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(error, match=message):
        read_weights(folder)


def test_a_configuration_that_is_no_json_is_named(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="config.json.*not readable as JSON"):
        read_weights(folder)
