"""PEFT's saved adapters give the weights that PEFT's own `merge_and_unload` gives."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from open_clip.transformer import VisionTransformer
from safetensors.torch import load_file, save_file

import adaptive_merge as am
from adaptive_merge.weights import Weights, read_weights
from weights.checkpoint_helpers import TOWER, build_clip, write
from weights.test_huggingface_models import transformers, vision_model


def peft():
    return pytest.importorskip("peft", reason="peft is a test extra and is not installed")


def adapted(model, folder, **settings):
    """PEFT's model of random factors, saved to a folder; its merged state dict."""
    library = peft()
    torch.manual_seed(1)
    model = library.get_peft_model(model, library.LoraConfig(init_lora_weights=False, **settings))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.requires_grad and "lora_" not in name:
                value.add_(0.1 * torch.randn_like(value))
            elif "magnitude" in name:
                value.mul_(1 + 0.1 * torch.randn_like(value))
    model.save_pretrained(folder)
    return {name: value.detach().clone() for name, value in model.merge_and_unload().state_dict().items()}


def base_of(model, path, **options) -> Weights:
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path / "base.safetensors")
    return read_weights(path / "base.safetensors", quick_gelu=True, **options)


def merged_of(state, path) -> Weights:
    save_file({name: value.contiguous() for name, value in state.items()}, path / "merged.safetensors")
    return read_weights(path / "merged.safetensors", quick_gelu=True)


def assert_close(ours: Weights, theirs: Weights, base: Weights) -> None:
    assert list(ours.tensors) == list(theirs.tensors)
    bank = am.TaskVectors.from_changes(base.tensors, {"task": ours.changes})
    assert all(torch.allclose(bank.expert("task")[name], ours.tensors[name], atol=1e-6) for name in ours.tensors)
    changed = 0
    for name, value in theirs.tensors.items():
        scale = float(value.abs().max())
        assert torch.allclose(ours.tensors[name], value, rtol=0, atol=1e-6 * max(scale, 1.0)), name
        changed += not torch.equal(ours.tensors[name], base.tensors[name])
    assert changed > 0


EVERYWHERE = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
SETTINGS = {
    "some": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8},
    "all": {"target_modules": EVERYWHERE, "r": 3, "lora_alpha": 5},
    "keys alone": {"target_modules": ["k_proj"], "r": 2},
    "rslora": {"target_modules": ["fc1", "q_proj"], "r": 4, "lora_alpha": 8, "use_rslora": True},
    "dora": {"target_modules": EVERYWHERE, "r": 4, "use_dora": True},
    "patterns": {
        "target_modules": EVERYWHERE,
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"fc1": 2, r"layers\.1\.self_attn\.q_proj": 1},
        "alpha_pattern": {r".*layers\.0\.mlp\.fc2": 3, "q_proj": 16},
    },
    "patterns that end alike": {
        "target_modules": ["fc1", "fc2"],
        "rank_pattern": {"1": 2, "c1": 3, "fc1": 5},
        "r": 4,
        "use_rslora": True,
    },
    "biases of the adapted": {"target_modules": ["fc1", "out_proj"], "bias": "lora_only"},
    "all biases": {"target_modules": ["q_proj"], "bias": "all"},
    "bias of the product": {"target_modules": ["v_proj", "fc2"], "lora_bias": True},
    "modules trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["layer_norm2", "visual_projection"]},
    "projection": {"target_modules": ["visual_projection", "fc1"]},
    "dora of the projection": {"target_modules": ["visual_projection"], "use_dora": True},
    "patches": {"target_modules": ["patch_embedding"], "r": 4},
    "dora of the patches": {"target_modules": ["patch_embedding"], "r": 4, "use_dora": True},
    "positions": {"target_modules": ["position_embedding"], "r": 2},
    "some layers": {"target_modules": ["fc1"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_hugging_face_adapters_equal_merge_and_unload(name, tmp_path):
    model = vision_model(projection=True)
    base = base_of(model, tmp_path)
    merged = merged_of(adapted(model, tmp_path / "adapter", **SETTINGS[name]), tmp_path)
    ours = read_weights(tmp_path / "adapter", base=base)
    assert_close(ours, merged, base)
    assert ours.manifest.format == "lora"


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["attn"], "r": 4, "lora_alpha": 3},
        {"target_modules": ["attn", "c_fc", "c_proj"], "rank_pattern": {"attn": 2}, "alpha_pattern": {"c_fc": 1}},
        {"target_modules": ["c_fc", "conv1"], "use_rslora": True},
        {"target_modules": ["c_proj"], "use_dora": True, "bias": "lora_only"},
    ],
    ids=["fused attention", "with the MLP", "convolution", "dora"],
)
@pytest.mark.parametrize("whole", [False, True], ids=["tower", "clip"])
def test_open_clip_adapters_equal_merge_and_unload(settings, whole, tmp_path):
    model = build_clip() if whole else build_clip().visual
    base = base_of(model, tmp_path)
    merged = merged_of(adapted(model, tmp_path / "adapter", **settings), tmp_path)
    ours = read_weights(tmp_path / "adapter", base=base)
    assert_close(ours, merged, base)
    assert any("outside the image tower" in note for note in ours.manifest.notes) == whole


def test_a_bare_vision_model_and_a_single_file(tmp_path):
    model = vision_model(projection=False)
    base = base_of(model, tmp_path)
    merged = merged_of(adapted(model, tmp_path / "adapter", target_modules=EVERYWHERE), tmp_path)
    assert_close(read_weights(tmp_path / "adapter/adapter_model.safetensors", base=base), merged, base)


def test_a_pickled_adapter_is_read_and_nothing_in_it_is_run(tmp_path):
    model = vision_model(projection=True)
    base = base_of(model, tmp_path)
    merged = merged_of(adapted(model, tmp_path / "adapter", target_modules=["fc1"]), tmp_path)
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    write(dict(tensors), tmp_path / "adapter/adapter_model.bin", "zip")
    assert_close(read_weights(tmp_path / "adapter", base=base), merged, base)


NAME = "base_model.model.transformer.resblocks.0.mlp.c_fc"


@pytest.fixture
def adapter(tmp_path, tower):
    """A folder as PEFT writes it for open_clip, the tower it belongs to, and how to change its files."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(tower, tmp_path / "tower.safetensors")
    base = read_weights(tmp_path / "tower.safetensors", quick_gelu=True)
    low, high = torch.randn(2, 64), torch.randn(256, 2)

    def saved(config=None, **tensors):
        factors = {f"{NAME}.lora_A.weight": low, f"{NAME}.lora_B.weight": high} | tensors
        save_file(
            {name: value for name, value in factors.items() if value is not None}, folder / "adapter_model.safetensors"
        )
        settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | (config or {})
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        return folder

    return saved, base, 2 * high @ low


def test_the_change_is_scale_times_the_product_and_nothing_else(adapter):
    saved, base, change = adapter
    ours = read_weights(saved(), base=base)
    name = "transformer.resblocks.0.mlp.c_fc.weight"
    assert torch.allclose(ours.tensors[name] - base.tensors[name], change, atol=1e-5)
    assert all(torch.equal(ours.tensors[other], base.tensors[other]) for other in base.tensors if other != name)


REFUSED = {
    "another method": ({"peft_type": "LOHA"}, {}, "only LORA adapters are read"),
    "no type": ({"peft_type": None}, {}, "only LORA"),
    "pissa": ({"init_lora_weights": "pissa"}, {}, "also changed the base"),
    "olora": ({"init_lora_weights": "olora"}, {}, "also changed the base"),
    "a setting of the future": ({"use_wonder": True}, {}, "use_wonder True: not known"),
    "replicated layers": ({"layer_replication": [[0, 2]]}, {}, "layer_replication"),
    "parameters": ({"target_parameters": ["proj"]}, {}, "target_parameters"),
    "transposed": ({"fan_in_fan_out": True}, {}, "fan_in_fan_out"),
    "another rank": ({"r": 3}, {}, "rank 2 in the weights, 3 in the configuration"),
    "no number": ({"lora_alpha": "8"}, {}, "should be positive numbers"),
    "rank zero": ({"r": 0}, {}, "should be positive numbers"),
    "no pattern": ({"alpha_pattern": {"(": 3}}, {}, "no pattern"),
    "a factor lost": ({}, {f"{NAME}.lora_B.weight": None}, "one factor"),
    "another width": (
        {},
        {f"{NAME}.lora_A.weight": torch.ones(2, 63)},
        "shape .256, 63., the pre-trained tower .256, 64",
    ),
    "another base": (
        {},
        {"base_model.model.transformer.resblocks.9.mlp.c_fc.lora_A.weight": torch.ones(2, 64)},
        "factor",
    ),
    "no finite number": ({}, {f"{NAME}.lora_A.weight": torch.full((2, 64), float("nan"))}, "NaN or infinite"),
    "the text tower's": ({"auto_mapping": {"base_model_class": "CLIP"}}, {}, "no tensor of an image tower"),
    "two towers": ({}, {"a.visual.proj": torch.ones(2), "b.visual.proj": torch.ones(2)}, "2 image towers"),
    "a scalar factor": ({}, {f"{NAME}.lora_A.weight": torch.tensor(1.0)}, r"shapes .256, 2. and .., no matrices"),
    "a row for a factor": ({}, {f"{NAME}.lora_B.weight": torch.ones(256)}, "no matrices"),
    "too many lengths": ({}, {f"{NAME}.lora_magnitude_vector": torch.ones(63)}, "63 lengths for 256 outputs"),
    "no lengths": ({}, {f"{NAME}.lora_magnitude_vector": torch.ones(0)}, "0 lengths"),
    "a projection of three dimensions": ({}, {"base_model.model.proj": torch.ones(2, 3, 4)}, "its product has shape"),
    "a bias of a matrix": ({}, {f"{NAME}.lora_B.bias": torch.ones(2, 3)}, "its product has shape"),
    "ranks that do not meet": ({"r": 3}, {f"{NAME}.lora_A.weight": torch.ones(3, 64)}, "factors of ranks 2 and 3"),
    "a vector adapted": (
        {},
        {f"base_model.model.ln_post.lora_{kind}.weight": torch.ones(2, 2) for kind in "AB"},
        "its product has shape .2, 2., the pre-trained tower .64, 1",
    ),
    "patterns in a list": ({"rank_pattern": ["fc1"]}, {}, "rank_pattern should map patterns to numbers"),
    "a number out of reach": ({"lora_alpha": 10**400}, {}, "should be positive numbers"),
    "a mapping that is none": ({"auto_mapping": ["CLIP"], "r": 3}, {}, "rank 2 in the weights"),
    "a pattern without end": ({"rank_pattern": {"([a-z_.0-9]+)+!": 2}}, {}, "repeats groups"),
    "a pattern of a high power": ({"alpha_pattern": {".*.*.*.*.*.*.*.*!": 2}}, {}, "more than 2 times"),
    "a stranger": ({}, {"base_model.model.prompt": torch.ones(2)}, "`prompt` has no place"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_folded_exactly_is_refused(name, adapter):
    saved, base, _ = adapter
    config, tensors, words = REFUSED[name]
    with pytest.raises(am.InputError, match=words):
        read_weights(saved(config, **tensors), base=base)


def test_attention_adapted_twice_is_refused(adapter):
    saved, base, _ = adapter
    attention = "base_model.model.transformer.resblocks.0.attn"
    twice = {
        f"{attention}.{part}.lora_{letter}.weight": torch.ones(2, 64) if letter == "A" else torch.ones(64, 2)
        for part in ("out_proj", "base_layer.out_proj")
        for letter in "AB"
    }
    with pytest.raises(am.InputError, match="adapted twice"):
        read_weights(saved(**twice), base=base)


def test_without_its_base_an_adapter_is_no_tower(adapter):
    with pytest.raises(am.InputError, match="give that tower as `base=`"):
        read_weights(adapter[0]())


def test_a_suite_mixes_full_and_lora_experts(adapter, tmp_path, clip):
    from data.data_sets import save

    saved, base, change = adapter
    expert = {name: value + 0.01 for name, value in base.tensors.items()}
    save_file(expert, tmp_path / "full.safetensors")
    torch.save({"weight": torch.randn(2, 24)}, tmp_path / "head.pt")
    (tmp_path / "tower.json").write_text(json.dumps({**TOWER, "quick_gelu": True}))
    for index in range(4):
        save(tmp_path / "birds" / ("owl", "jay")[index % 2] / f"{index}.png", index)
    suite = am.ClipSuite(
        architecture=str(tmp_path / "tower.json"),
        pretrained=str(tmp_path / "tower.safetensors"),
        experts={"lora": str(saved()), "full": str(tmp_path / "full.safetensors")},
        tasks=["lora", "full"],
        heads={"lora": str(tmp_path / "head.pt"), "full": str(tmp_path / "head.pt")},
        folders={"lora": str(tmp_path / "birds"), "full": str(tmp_path / "birds")},
        cache=str(tmp_path / "cache"),
    )
    bank = am.load_clip_suite(suite).task_vectors
    assert bank.factors is not None
    matrix = bank.of("transformer.resblocks.0.mlp.c_fc.weight")
    assert torch.allclose(matrix[0], change, atol=1e-5)
    assert bank.vectors[0].count_nonzero() == matrix[0].count_nonzero()
    suite = dataclasses.replace(suite, bank="bfloat16")
    rounded = am.load_clip_suite(suite).task_vectors
    assert rounded.factors is None and torch.allclose(rounded.vectors.float(), bank.vectors[:, :], rtol=1e-2, atol=1e-6)
    assert torch.allclose(bank.vectors[1], torch.full_like(bank.vectors[1], 0.01), atol=1e-6)


def test_the_features_are_those_of_the_adapted_model(tmp_path):
    model = vision_model(projection=True)
    base = base_of(model, tmp_path)
    merged = adapted(model, tmp_path / "adapter", target_modules=EVERYWHERE, r=4)
    library = transformers()
    theirs = library.CLIPVisionModelWithProjection(model.config).eval()
    theirs.load_state_dict(merged)
    ours = read_weights(tmp_path / "adapter", base=base)
    facts = ours.manifest
    from open_clip.transformer import QuickGELU

    sizes = (facts.image_size, facts.patch, facts.width, facts.layers, 2, facts.mlp_width / facts.width)
    tower = VisionTransformer(*sizes, output_dim=facts.embed_dim, act_layer=QuickGELU).eval()
    tower.load_state_dict(ours.tensors)
    pixels = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        assert torch.allclose(tower(pixels), theirs(pixels).image_embeds, atol=1e-5)


def test_biases_that_an_old_peft_left_out_are_told(adapter):
    saved, base, _ = adapter
    assert any("left them out" in note for note in read_weights(saved({"bias": "lora_only"}), base=base).manifest.notes)
    kept = {f"{NAME}.base_layer.bias": torch.ones(256)}
    ours = read_weights(saved({"bias": "lora_only"}, **kept), base=base)
    assert not ours.manifest.notes
    assert torch.equal(ours.tensors["transformer.resblocks.0.mlp.c_fc.bias"], torch.ones(256))


def test_a_run_over_lora_experts_from_yaml_to_export(adapter, tmp_path, monkeypatch, capsys):
    from data.data_sets import save

    from adaptive_merge.__main__ import main

    monkeypatch.chdir(tmp_path)
    saved, base, _ = adapter
    saved()
    save_file({name: value + 0.01 for name, value in base.tensors.items()}, "full.safetensors")
    torch.save({"weight": torch.randn(2, 24)}, "head.pt")
    (tmp_path / "tower.json").write_text(json.dumps({**TOWER, "quick_gelu": True}))
    for index in range(8):
        save(tmp_path / "birds" / ("owl", "jay")[index % 2] / f"{index}.png", index)
    paths = {"architecture": "tower.json", "pretrained": "tower.safetensors"}
    paths |= {"experts": {"lora": "adapter", "full": "full.safetensors"}}
    paths |= {"heads": dict.fromkeys(("lora", "full"), "head.pt"), "folders": dict.fromkeys(("lora", "full"), "birds")}
    (tmp_path / "suite.json").write_text(
        json.dumps({"kind": "clip", "tasks": ["lora", "full"], "sizes": "any", **paths})
    )
    (tmp_path / "run.yaml").write_text(
        "suite: {name: ., banks: kept}\nmodel: {recipe: lora, transforms: [TSVM], coefficients: LayerWise}\n"
        "data: {images_per_task: 2}\ntrainer: {max_steps: 2, accelerator: cpu, enable_progress_bar: false}\n"
    )
    assert main(["fit", "--config", "run.yaml"]) == 0, capsys.readouterr().err
    assert main(["fit", "--config", "run.yaml", "--run.name", "plain", "--model.transforms", "[]"]) == 0
    results = json.loads((tmp_path / "runs/plain/results.json").read_text())
    assert results["steps"] == 2 and results["tasks"]["lora"]["n"] == 8
    assert main(["export", "runs/plain", "--format", "open_clip", "--output", "out", "--verify"]) == 0
    assert "alignment.adapted" in load_file("runs/plain/diagnostics.safetensors")
