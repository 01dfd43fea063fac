"""Every format gives the run's own features or logits when its own library loads it."""

from __future__ import annotations

import importlib.util

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from users_method import Router

import adaptive_merge as am
from adaptive_merge.export import export_model, load_adapters
from adaptive_merge.export.tower import plain_tower
from adaptive_merge.weights import read_weights
from export.export_helpers import CLASSES, build_module, build_tower

FORMATS = ("safetensors", "open_clip", "hf", "onnx")
NEEDS = {"hf": ("transformers",), "onnx": ("onnx", "onnxscript", "onnxruntime")}
BOUNDS = {"open_clip": 0.0, "safetensors": 0.0, "hf": 1e-5, "onnx": 1e-5}


def need(format):
    for package in NEEDS.get(format, ()):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is an optional package and is not installed")


def normalised(module, batch):
    return module.model.backbone.normalise(batch)


@torch.no_grad()
def features_of(folder, format, module, images):
    if format == "open_clip":
        return open_clip.create_model(f"local-dir:{folder}").eval().encode_image(images)
    if format == "hf":
        from transformers import CLIPVisionModelWithProjection

        return CLIPVisionModelWithProjection.from_pretrained(str(folder)).eval()(images).image_embeds
    if format == "onnx":
        return run_onnx(folder, images)
    return plain_tower(module.model.backbone, load_file(folder / "model.safetensors"))(images)


def run_onnx(folder, images):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@pytest.mark.parametrize(
    ("format", "task"), [(format, task) for format in FORMATS for task in (None, "green/blue")][:-1]
)
def test_features_survive_the_round_trip(tmp_path, tinted, batch, format, task):
    need(format)
    told = export_model(tinted, tmp_path / "out", format, task=task)
    assert "32 images" in told
    images = normalised(tinted, batch)
    found = features_of(tmp_path / "out", format, tinted, images)
    with torch.no_grad():
        merged = {k: v for k, v in tinted.merged_state_dict(task).items()}
        wanted = tinted(task, images) if format == "onnx" and task else tinted.model.backbone(images, merged)
    scale = max(1.0, float(wanted.abs().max()))
    assert float((found - wanted).abs().max()) / scale <= BOUNDS[format]
    assert not list(tmp_path.glob(".*")) and {p.suffix for p in (tmp_path / "out").iterdir()} <= {
        *(".md", ".json", ".safetensors", ".onnx")
    }


@pytest.mark.parametrize("format", ["open_clip", "safetensors"])
def test_a_folded_task_gives_the_tasks_own_logits(tmp_path, tinted, batch, format):
    export_model(tinted, tmp_path / "out", format, task="red")
    head = load_file(tmp_path / "out" / "heads.safetensors")
    images = normalised(tinted, batch)
    unit = F.normalize(features_of(tmp_path / "out", format, tinted, images), dim=-1)
    with torch.no_grad():
        assert torch.allclose(F.linear(unit, head["red.weight"], head["red.bias"]), tinted("red", images), atol=1e-5)
    assert set(head) == {"red.weight", "red.bias"}


@pytest.mark.parametrize("format", ["open_clip", "hf", "safetensors"])
def test_surgery_has_no_place_in_a_plain_tower(tmp_path, operated, format):
    for module in (operated, build_module(adapters=[am.FeatureSurgery(4)])):
        with pytest.raises(am.InputError, match="cannot be folded .* ReLU"):
            export_model(module, tmp_path / "out", format, task="red")
    assert not list(tmp_path.iterdir())


def test_onnx_holds_surgery_and_takes_any_batch(tmp_path, operated, batch):
    need("onnx")
    module = operated
    export_model(module, tmp_path / "onnx", "onnx", task="red")
    images = normalised(module, batch)
    with torch.no_grad():
        wanted = module("red", images)
    found = run_onnx(tmp_path / "onnx", images)
    assert float((found - wanted).abs().max() / wanted.abs().max()) <= 1e-5
    assert float((run_onnx(tmp_path / "onnx", images[:1]) - wanted[:1]).abs().max() / wanted.abs().max()) <= 1e-5
    content = (tmp_path / "onnx" / "model.onnx").read_bytes()
    assert b"/adaptive_merge/" not in content and b"site-packages" not in content


def test_surgery_that_is_still_the_identity_folds(tmp_path, batch):
    module = build_module(adapters=[am.FeatureSurgery(4)])
    with torch.no_grad():
        module.model.adapters[0].up[1].zero_()
    assert "largest difference 0.0e+00" in export_model(module, tmp_path / "out", "safetensors", task="green/blue")


def test_our_own_reader_knows_what_it_reads(tmp_path, module):
    need("hf")
    for format in ("open_clip", "hf", "safetensors"):
        export_model(module, tmp_path / format, format)
        source = tmp_path / format / ("model.safetensors" if format == "safetensors" else "")
        weights = read_weights(source)
        assert weights.manifest.quick_gelu is True and weights.manifest.heads == 2
        assert all(torch.equal(weights.tensors[k], v) for k, v in module.merged_state_dict().items())


def test_gelu_and_quick_gelu_towers_are_told_apart(tmp_path):
    module = build_module(build_tower(act_layer=torch.nn.GELU))
    export_model(module, tmp_path / "out", "open_clip")
    assert read_weights(tmp_path / "out").manifest.quick_gelu is False


def test_the_folder_with_a_text_tower_is_a_whole_clip(tmp_path, module):
    torch.manual_seed(1)
    vision = {"layers": 1, "width": 64, "patch_size": 8, "image_size": 32, "head_width": 32}
    text = {"context_length": 16, "vocab_size": 64, "width": 64, "heads": 1, "layers": 1}
    clip = open_clip.CLIP(24, vision, text, quick_gelu=True).eval()
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    export_model(module, tmp_path / "out", "open_clip", text=str(tmp_path / "clip.pt"))
    found = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    tokens = torch.randint(0, 64, (3, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(found.encode_text(tokens), clip.encode_text(tokens))
    assert found.logit_scale == clip.logit_scale


def test_towers_that_a_format_cannot_express_are_refused_with_the_reason(tmp_path, toy):
    module = build_module(build_tower(pool_type="avg"))
    for format in ("open_clip", "hf"):
        with pytest.raises(am.InputError, match="pool_type is 'avg'.*onnx or safetensors"):
            export_model(module, tmp_path / "out", format)
    export_model(module, tmp_path / "out", "safetensors")


def test_bad_requests_leave_nothing_behind(tmp_path, module):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("precious")
    for arguments, message in (
        ((tmp_path / "full", "safetensors"), "exists already"),
        ((tmp_path / "out", "pickle"), "unknown format"),
    ):
        with pytest.raises(am.InputError, match=message):
            export_model(module, *arguments)
    with pytest.raises(am.InputError, match="no task 'rad'; did you mean 'red'"):
        export_model(module, tmp_path / "out", "safetensors", task="rad")
    with pytest.raises(am.InputError, match="leave out --text"):
        export_model(module, tmp_path / "out", "hf", text="clip.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_difference_is_found_and_nothing_kept(tmp_path, module, monkeypatch):
    from adaptive_merge.export import verify

    load = verify.load_file
    monkeypatch.setattr(verify, "load_file", lambda path: {k: v + 1e-6 for k, v in load(path).items()})
    with pytest.raises(am.InputError, match="differs from the run"):
        export_model(module, tmp_path / "out", "safetensors")
    assert not list(tmp_path.iterdir())


def test_the_card_says_what_is_in_it(tmp_path, module):
    row = {"n": 1234, "pretrained": 0.1, "individual": 0.9, "initial": 0.5, "adapted": 0.625}
    results = {"tasks": {task: row for task in CLASSES}, "average": {k: v for k, v in row.items() if k != "n"}}
    export_model(module, tmp_path / "out", "safetensors", results=results, command="adaptive-merge export mine")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| green/blue | 1,234 | 10.0 | 90.0 | 50.0 | 62.5 |" in card and "adaptive-merge export mine" in card
    assert all(digest in card for digest in module.experts.fingerprints.values())
    assert str(tmp_path) not in card and "$" not in card
    assert "| coefficients | LayerWise (init 0.3, bounds clamp, trainable True), " in card
    assert "| adapters | " in card


def test_the_exported_adapters_fit_a_fresh_module(tmp_path, tinted, batch):
    export_model(tinted, tmp_path / "out", "safetensors")
    fresh = build_module(adapters=[am.Tint("proj"), am.Tint("head")])
    with torch.no_grad():
        fresh.coefficients.values.zero_()
        load_adapters(fresh, tmp_path / "out" / "adapters.safetensors")
        assert torch.equal(fresh("red", batch), tinted("red", batch))


def test_onnx_holds_a_users_router_in_what_all_tasks_share(tmp_path, batch):
    need("onnx")
    module = build_module(build_tower(act_layer=torch.nn.GELU), adapters=[Router(3)]).train()
    images = normalised(module, batch)
    export_model(module, tmp_path / "out", "onnx")
    assert all(part.training for part in module.model.adapters.modules())
    with torch.no_grad():
        wanted = module.model.shared_features(images)
        assert not torch.allclose(wanted, module.model.backbone(images), atol=1e-3)
    assert float((run_onnx(tmp_path / "out", images) - wanted).abs().max() / wanted.abs().max()) <= 1e-5


def test_heads_of_every_kind_are_exported(tmp_path, module, batch):
    layer = torch.nn.Linear(24, 3)
    mixed = build_module(heads={"red": layer})
    told = export_model(mixed, tmp_path / "out", "safetensors")
    head = load_file(tmp_path / "out" / "heads.safetensors")
    assert "largest difference 0.0e+00" in told
    assert torch.equal(head["red.bias"], layer.bias) and "grey.bias" not in head
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Logits of red are `features @ weight.T (+ bias)`" in card
    assert "Logits of grey are `normalize(features) @ weight.T (+ bias)`" in card
