"""An open_clip folder of a CLIP suite is a whole CLIP where the suite knows the text tower, and its card the family."""

from __future__ import annotations

import json

import open_clip
import pytest
import torch
from data.data_sets import save
from weights.checkpoint_helpers import TOWER, build_clip

import adaptive_merge as am
from adaptive_merge.__main__ import main
from adaptive_merge.cli.export import _hub_names


@pytest.fixture
def suite(tmp_path):
    """A tiny CLIP with its text tower, one expert, and a configuration."""
    clip = build_clip()
    torch.save(clip.state_dict(), tmp_path / "pretrained.pt")
    torch.save({k: v + 0.01 for k, v in clip.state_dict().items() if k.startswith("visual.")}, tmp_path / "birds.pt")
    torch.save({"weight": torch.randn(2, 24)}, tmp_path / "head.pt")
    (tmp_path / "tower.json").write_text(json.dumps({**TOWER, "quick_gelu": True}))
    for index in range(4):
        save(tmp_path / "images" / ("owl", "jay")[index % 2] / f"{index}.png", index)
    names = {"architecture": "tower.json", "pretrained": "pretrained.pt", "experts": {"birds": "birds.pt"}}
    names |= {"heads": {"birds": "head.pt"}, "folders": {"birds": "images"}}
    (tmp_path / "suite.json").write_text(json.dumps({"kind": "clip", "tasks": ["birds"], "sizes": "any", **names}))
    (tmp_path / "merge.yaml").write_text(
        f"suite: {{name: {tmp_path}}}\nmodel: {{coefficients: {{class_path: Fixed}}}}\n"
    )
    return clip


def test_the_suites_text_tower_is_kept_and_the_file_loads_by_name(suite, tmp_path, capsys):
    arguments = ["export", str(tmp_path / "merge.yaml"), "--format", "open_clip", "--output", str(tmp_path / "out")]
    assert main([*arguments, "--verify"]) == 0, capsys.readouterr().err
    assert "placeholder" not in (tmp_path / "out" / "README.md").read_text()
    open_clip.add_model_config(tmp_path / "tower.json")
    model, _, preprocess = open_clip.create_model_and_transforms(
        "tower", pretrained=str(tmp_path / "out" / "open_clip_model.safetensors"), force_quick_gelu=True
    )
    tokens = torch.randint(0, 64, (3, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model.eval().encode_text(tokens), suite.encode_text(tokens))
        pixels = torch.randn(2, 3, 32, 32)
        merged = am.load_run(str(tmp_path / "merge.yaml")).eval()
        assert torch.allclose(model.encode_image(pixels), merged.model.backbone(pixels), atol=1e-6)
    assert model.logit_scale == suite.logit_scale


def test_without_a_text_tower_anywhere_it_is_a_placeholder(suite, tmp_path):
    visual = {name: value for name, value in suite.state_dict().items() if name.startswith("visual.")}
    torch.save(visual, tmp_path / "pretrained.pt")
    arguments = ["export", str(tmp_path / "merge.yaml"), "--format", "open_clip", "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert "placeholder of zeros" in (tmp_path / "out" / "README.md").read_text()


def test_the_family_on_the_hub_is_named_once_without_revisions():
    suite = am.ClipSuite(
        architecture="ViT-B-32",
        pretrained="hf-hub:openai/clip@abc",
        experts={"a": "hf-hub:me/a", "b": "hf-hub:me/a@v1", "c": "here.pt"},
        tasks=["a", "b", "c"],
    )
    assert _hub_names(suite) == ["openai/clip", "me/a"]


def test_a_name_that_the_hub_refuses_is_met_before_anything_is_written(suite, tmp_path, capsys):
    arguments = ["export", str(tmp_path / "merge.yaml"), "--format", "open_clip", "--output", str(tmp_path / "out")]
    assert main([*arguments, "--push", "merged"]) == 2
    assert "<user or organisation>/<name>" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
