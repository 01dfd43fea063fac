"""Experts as one vector and bit masks: the bits, the round trip, the choice of λ, and what is refused."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import adaptive_merge as am
from adaptive_merge.__main__ import main
from adaptive_merge.export.tall import GRID, export_tall
from adaptive_merge.export.tall_file import FILE
from export.export_helpers import build_module


def bits(experts, merged, task, threshold):
    """The packed mask by its definition: bit by bit, the first entry in the highest."""
    row = experts.vectors[experts.tasks.index(task)].double().numpy()
    kept = np.abs(row) > threshold * np.abs(merged.double().numpy() - row)
    packed = bytearray(-(-len(kept) // 8))
    for place in np.flatnonzero(kept):
        packed[place // 8] |= 128 >> (place % 8)
    return bytes(packed), kept


@pytest.mark.parametrize("transforms", [[], [am.Ties(0.5)]])
def test_the_bits_and_the_rebuilt_experts(tmp_path, transforms):
    module = build_module(transforms=transforms)
    thresholds = [0.2, 0.4, 0.6]
    kept, told = export_tall(module, tmp_path / "out", thresholds=thresholds)
    tall, experts = am.load_tall(tmp_path / "out"), module.experts
    vectors = transforms[0](experts).vectors if transforms else experts.vectors
    torch.testing.assert_close(tall.merged, vectors.sum(0))
    assert tall.tasks == experts.tasks and list(tall.thresholds.values()) == thresholds
    for task, threshold in zip(experts.tasks, thresholds):
        packed, mask = bits(experts, tall.merged, task, threshold)
        assert bytes(tall.masks[task].numpy()) == packed
        assert kept[task].density == pytest.approx(mask.mean())
        flat = experts.pretrained + torch.from_numpy(mask) * tall.merged
        rebuilt, expected = tall.expert(task), experts.layout.unflatten(flat)
        assert rebuilt.keys() == experts.expert(task).keys()
        assert all(torch.equal(rebuilt[name], value) for name, value in expected.items())
    size = (tmp_path / "out" / FILE).stat().st_size
    assert f"3 experts in {size:,} bytes" in told and size < (8 + 3 / 8 + 0.1) * experts.layout.numel + 20_000
    assert {path.name for path in (tmp_path / "out").iterdir()} == {FILE, "heads.safetensors", "README.md"}


def test_experts_that_share_no_entry_come_back_whole(tmp_path):
    module = build_module()
    experts = module.experts
    owner = torch.arange(experts.layout.numel) % 3
    apart = experts.with_vectors(experts.vectors * (owner == torch.arange(3)[:, None]))
    heads = {task: head.weight for task, head in module.model.heads.items()}
    module = am.AdaptiveMerge(apart, module.model.backbone.skeleton.to_empty(device="cpu"), heads)
    export_tall(module, tmp_path / "out", thresholds=0.4)
    for task in apart.tasks:
        expert, rebuilt = apart.expert(task), am.load_tall(tmp_path / "out" / FILE).expert(task)
        assert all(torch.equal(rebuilt[name], value) for name, value in expert.items())


def test_the_command_chooses_by_agreement_and_says_what_is_kept(suite_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content = {"suite": {"name": str(suite_folder)}, "model": {"recipe": "ta"}, "data": {"start_images": 16}}
    (tmp_path / "ta.yaml").write_text(json.dumps(content))
    command = ["export", "ta.yaml", "--format", "tall", "--output"]
    assert main([*command, "chosen"]) == 0
    shown = capsys.readouterr().out
    assert "rebuilt, %" in shown and "3 experts in" in shown and "average" in shown
    tall = am.load_tall("chosen")
    suite = am.load_suite(str(suite_folder))
    backbone = suite.backbone.eval()
    pixels = {task: suite.data.images[task].take(suite.data.draws.opening(task, 16)) for task in tall.tasks}

    def agreement(task, threshold):
        _, mask = bits(suite.task_vectors, tall.merged, task, threshold)
        rebuilt = suite.task_vectors.pretrained + torch.from_numpy(mask) * tall.merged
        says = []
        for weights in (suite.task_vectors.layout.unflatten(rebuilt), suite.task_vectors.expert(task)):
            images = (pixels[task].float() / 255 - 0.5) / 0.25
            features = torch.func.functional_call(backbone, dict(weights), (images,))
            says.append((torch.nn.functional.normalize(features, dim=-1) @ suite.heads[task].T).argmax(1))
        return (says[0] == says[1]).float().mean().item()

    for task, threshold in tall.thresholds.items():
        assert threshold in GRID
        assert agreement(task, threshold) == pytest.approx(max(agreement(task, one) for one in GRID))
    assert "chosen by agreement" in (tmp_path / "chosen/README.md").read_text()
    assert set(load_file("chosen/heads.safetensors")) == {f"{task}.weight" for task in tall.tasks}
    monkeypatch.setattr(am.TaskStream, "start_batches", lambda *_: pytest.fail("an image was read"))
    assert main([*command, "given", "--threshold", "0.3"]) == 0
    assert set(am.load_tall("given").thresholds.values()) == {0.3}


@pytest.mark.parametrize("place", [20, 3000, -1])
def test_a_damaged_file_is_refused(tmp_path, place):
    export_tall(build_module(), tmp_path / "out", thresholds=0.4)
    path = tmp_path / "out" / FILE
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)
    with pytest.raises(am.InputError, match="changed or damaged"):
        am.load_tall(tmp_path / "out")


def test_what_cannot_be_is_refused(tmp_path, module, capsys):
    with pytest.raises(am.InputError, match="give a stream, or thresholds"):
        export_tall(module, tmp_path / "out")
    for wrong in ([0.2, 0.4], -0.1):
        with pytest.raises(am.InputError, match="one for each of the 3 tasks"):
            export_tall(module, tmp_path / "out", thresholds=wrong)
    with pytest.raises(am.InputError, match="leave out `start`"):
        export_tall(build_module(start=am.RegMean(), coefficients=am.LayerWise(0.3, "free")), tmp_path / "out")
    am.save_adapters(module, tmp_path / "other.safetensors")
    with pytest.raises(am.InputError, match="holds no masks"):
        am.load_tall(tmp_path / "other.safetensors")
    with pytest.raises(am.MissingFileError):
        am.load_tall(tmp_path / "nothing.safetensors")
    with pytest.raises(am.InputError, match="no task 'rde' in these masks; did you mean 'red'"):
        export_tall(module, tmp_path / "kept", thresholds=0.4)
        am.load_tall(tmp_path / "kept").expert("rde")
    assert not (tmp_path / "out").exists()
    for words in (["--format", "tall", "--task", "red"], ["--format", "hf", "--threshold", "1"]):
        assert main(["export", "task_arithmetic", "--output", str(tmp_path / "out"), *words]) == 2
    assert "leave out --task" in capsys.readouterr().err
