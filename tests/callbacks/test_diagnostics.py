"""Diagnostics of the weights and of the layers: what a run records, and what is read from it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from report.sample_runs import write_run
from safetensors.torch import load_file

import adaptive_merge as am
from adaptive_merge.__main__ import main
from adaptive_merge.callbacks import Diagnostics
from adaptive_merge.callbacks.record.contributions import OUTSIDE, contributions, layers_of
from adaptive_merge.files import save_tensors
from adaptive_merge.report.html import write_report
from adaptive_merge.runs.interference import alignment
from adaptive_merge.runs.reading import read_run, read_tensors

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture
def trained(toy, bank, heads, images, tmp_path):
    module = am.Surgery(bank, toy, heads, rank=2)
    stream = am.TaskStream(images, images_per_task=4)
    keeper = Diagnostics(str(tmp_path), images=12, contributions=8)
    trainer = pl.Trainer(max_steps=2, callbacks=[keeper], **QUIET)
    trainer.fit(module, stream)
    am.score(trainer, module, stream)
    return module, stream


def test_scoring_records_interference_and_contributions(trained, tmp_path):
    module, stream = trained
    arrays, names = read_tensors(tmp_path / "diagnostics.safetensors")
    assert names["layers"] == [OUTSIDE, "blocks.0", "blocks.1"] and names["parameters"] == list(module.experts.names)
    assert arrays["sign_conflicts"].shape == (2, len(module.experts.names))
    assert arrays["masks.kept_by"].sum() == pytest.approx(1)
    merged = module.merged_state_dict()
    assert np.allclose(arrays["alignment.adapted"], alignment(module.experts, merged))
    for column, task in enumerate(module.tasks):
        batch = stream.images[task].take(torch.from_numpy(arrays[f"sample.{column}"])[:8].long())
        with torch.no_grad():
            expert = module.model(task, batch, module.experts.expert(task), adapted=False).logits.argmax(-1)
            whole = (module.model(task, batch).logits.argmax(-1) == expert).double().mean()
            for row, layer in enumerate(names["layers"]):
                weights = {
                    name: module.experts.layout.unflatten(module.experts.pretrained)[name]
                    if name.startswith(layer) or (layer == OUTSIDE and "blocks" not in name)
                    else value
                    for name, value in merged.items()
                }
                rest = (module.model(task, batch, weights).logits.argmax(-1) == expert).double().mean()
                assert arrays["contribution"][row, column] == pytest.approx(float(whole - rest), abs=1e-6)


def test_a_layer_without_a_share_contributes_nothing_and_missing_images_are_holes(trained):
    module, stream = trained
    merged = dict(module.merged_state_dict())
    base = module.experts.layout.unflatten(module.experts.pretrained)
    merged |= {name: base[name] for name in layers_of(module.experts.layout)["blocks.0"]}
    before = {name: value.clone() for name, value in merged.items()}
    found = contributions(module, merged, {"red": stream.images["red"].take(torch.arange(6))})
    assert found[1, 0] == 0 and found[:, 1:].isnan().all()
    assert all(torch.equal(before[name], value) for name, value in merged.items())


@pytest.mark.parametrize("number", [-1, 13])
def test_contributions_need_kept_images(number):
    with pytest.raises(am.InputError, match="`contributions` must be from 0 to `images`, 12"):
        Diagnostics(images=12, contributions=number)


def test_a_run_shows_and_prints_what_it_has(trained, tmp_path, capsys):
    folder = write_run(tmp_path / "run", tasks=("red", "green", "blue"))
    old = write_run(tmp_path / "old", tasks=("red", "green", "blue"))
    (tmp_path / "diagnostics.safetensors").rename(folder / "diagnostics.safetensors")
    main(["inspect", str(folder), "--json"])
    content = json.loads(capsys.readouterr().out)
    assert set(content["interference"]) == {"sign_conflicts", "masks", "alignment", "contribution"}
    assert set(content["interference"]["contribution"]["blocks.1"]) == {"red", "green", "blue"}
    assert content["measures"]["normalised"]["initial"]["mean_of_ratios"] == pytest.approx(0.6 / 0.95)
    page = write_report([folder], tmp_path / "new.html").read_text()
    titles = ("Sign conflicts", "Overlap of TALL-masks", "Subspace alignment", "Contribution of the layers")
    assert all(title in page for title in titles) and "could not be drawn" not in page
    assert "mean of ratios" in page and ">NAI<" in page
    main(["inspect", str(old), "--json"])
    assert json.loads(capsys.readouterr().out)["interference"] == {}
    page = write_report([old], tmp_path / "old.html").read_text()
    assert not any(title in page for title in titles) and "could not be drawn" not in page


def test_metadata_that_do_not_fit_leave_a_hole(trained, tmp_path):
    folder = write_run(tmp_path / "run", tasks=("red", "green", "blue"))
    tensors = load_file(tmp_path / "diagnostics.safetensors")
    save_tensors(folder / "diagnostics.safetensors", tensors, {"tasks": json.dumps(["red", "green", "blue"])})
    known = read_run(folder).diagnostics.interference()
    assert "sign_conflicts" not in known and known["contribution"] == {}
    assert "could not be drawn" not in write_report([folder], tmp_path / "r.html").read_text()
