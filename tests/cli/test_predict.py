"""`adaptive-merge predict`, and runs on images without labels."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import TASKS, write_manifest
from PIL import Image

import adaptive_merge as am
from adaptive_merge.__main__ import main

CONFIG = """
suite: {{name: {folder}}}
model:
  recipe: quick
  coefficients: {{class_path: LayerWise, init_args: {{init: 0.3}}}}
trainer: {{max_steps: 2, accelerator: cpu, enable_progress_bar: false}}
data: {{images_per_task: 4}}
"""


@pytest.fixture(scope="module")
def run(suite_folder, tmp_path_factory):
    """A finished run over the toy suite."""
    folder = tmp_path_factory.mktemp("predict")
    (folder / "quick.yaml").write_text(CONFIG.format(folder=suite_folder))
    assert main(["fit", "--config", str(folder / "quick.yaml"), "--run.root", str(folder)]) == 0
    return folder / "quick"


@pytest.fixture
def folder(suite_folder, tmp_path):
    """The test images of the task "red" as files, some in a folder of their own, in the order of their names."""
    pixels = np.load(suite_folder / "images" / "red.npz")["test_images"]
    for index, image in enumerate(pixels):
        path = tmp_path / "photos" / ("a" if index % 2 else "b") / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return tmp_path / "photos"


def rows_of(path):
    return list(csv.DictReader(path.open()))


def test_predictions_are_those_of_the_run(run, folder, tmp_path, capsys, suite_folder):
    assert main(["predict", str(run), str(folder), "--task", "red", "--output", str(tmp_path / "out.csv")]) == 0
    assert "24 predictions of task 'red'" in capsys.readouterr().out
    rows = rows_of(tmp_path / "out.csv")
    assert [row["image"] for row in rows] == sorted(row["image"] for row in rows) and len(rows) == 24
    module = am.load_run(str(run)).eval()
    pixels = torch.from_numpy(np.load(suite_folder / "images" / "red.npz")["test_images"])
    with torch.no_grad():
        logits = module("red", pixels[:, None].expand(-1, 3, -1, -1))
    for row in rows:
        one = logits[int(row["image"][2:4])]
        assert int(row["class"]) == int(one.argmax())
        assert float(row["confidence"]) == pytest.approx(float(one.softmax(-1).max()), abs=2e-6)
        assert row["name"] == f"red {row['class']}"


def test_names_of_classes_from_a_file(run, folder, tmp_path):
    (tmp_path / "names.txt").write_text("".join(f"shade {index}\n" for index in range(TASKS["red"])))
    options = ["--task", "red", "--output", str(tmp_path / "out.csv"), "--classes", str(tmp_path / "names.txt")]
    assert main(["predict", str(run), str(folder), *options]) == 0
    assert all(row["name"] == f"shade {row['class']}" for row in rows_of(tmp_path / "out.csv"))


def test_mistakes_are_one_message(run, folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "names.txt").write_text("one\n")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "x.png").write_bytes(b"no image")
    cases = {
        "say which by --task": [str(run), str(folder)],
        "there is no task 'rde'": [str(run), str(folder), "--task", "rde"],
        "there is no such folder": [str(run), str(tmp_path / "nowhere"), "--task", "red"],
        "there is no image": [str(run), str(tmp_path / "empty"), "--task", "red"],
        "1 class names": [str(run), str(folder), "--task", "red", "--classes", str(tmp_path / "names.txt")],
        "not a readable image": [str(run), str(damaged), "--task", "red"],
        "and a folder of images": [str(run)],
        "--batch-size is at least 1": [str(run), str(folder), "--task", "red", "--batch-size", "0"],
    }
    for words, arguments in cases.items():
        assert main(["predict", *arguments, "--output", str(tmp_path / "out.csv")]) == 2, words
        assert words in " ".join(capsys.readouterr().err.split()), words
        assert not (tmp_path / "out.csv").exists()


def test_trainer_predict_gives_every_scored_image_once(suite_folder):
    suite = am.load_suite(str(suite_folder))
    module = am.AdaptiveMerge(suite.task_vectors, suite.backbone, suite.heads)
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    found = trainer.predict(module, datamodule=suite.data)
    for task, batches in zip(TASKS, found):
        assert {batch["task"] for batch in batches} == {task}
        assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(24))


@pytest.fixture
def unlabelled(suite_folder, tmp_path):
    """The toy suite without a label."""
    folder = shutil.copytree(suite_folder, tmp_path / "suite")
    for path in (folder / "images").iterdir():
        np.savez(path, test_images=np.load(path)["test_images"])
    write_manifest(folder)
    (tmp_path / "quick.yaml").write_text(CONFIG.format(folder=folder))
    return tmp_path


def test_without_labels_a_run_reports_agreement(unlabelled, run, monkeypatch, capsys):
    monkeypatch.chdir(unlabelled)
    assert main(["fit", "--config", "quick.yaml"]) == 0
    out = capsys.readouterr().out
    assert "agreement with the experts (no labels) in %" in out and "accuracy" not in out
    found = json.loads((unlabelled / "runs/quick/results.json").read_text())
    labelled = json.loads((run / "results.json").read_text())
    assert found["measure"] == "agreement" and labelled["measure"] == "accuracy"
    assert found["calibration"] == {}
    assert all(row["individual"] == 1 for row in found["tasks"].values())
    # Labels never had a part in what was learned, nor in the criteria.
    assert found["criteria"] == labelled["criteria"]
    for view in ("initial", "adapted"):
        assert found["average"][view] == pytest.approx(labelled["criteria"][view]["agreement"], abs=1e-6)
    # Against plain code: the part of the images on which θ₀ and the expert say the same.
    suite = am.load_suite(str(unlabelled / "suite"))
    module = am.AdaptiveMerge(suite.task_vectors, suite.backbone, suite.heads).eval()
    with torch.no_grad():
        for task, images in suite.images.items():
            pixels = images.take(torch.arange(len(images)))
            said = [
                module.model(task, pixels, weights, adapted=False).logits.argmax(-1)
                for weights in (
                    module.experts.layout.unflatten(module.experts.pretrained),
                    {n: v for n, v in module.experts.expert(task).items() if n in module.experts.names},
                )
            ]
            assert found["tasks"][task]["pretrained"] == pytest.approx(float((said[0] == said[1]).float().mean()))
    report = (unlabelled / "runs/quick/report.html").read_text()
    assert "adapted agreement" in report and "Accuracies are top-1" not in report


def test_what_needs_labels_is_refused_without(unlabelled, monkeypatch, capsys):
    monkeypatch.chdir(unlabelled)
    oracle = ["--run.select", "oracle", "--trainer.val_check_interval", "1"]
    assert main(["fit", "--config", "quick.yaml", *oracle]) == 2
    assert "images of task 'red' have none" in " ".join(capsys.readouterr().err.split())
    assert not (unlabelled / "runs/quick/results.json").exists()


def test_a_single_pass_without_labels(unlabelled, monkeypatch, capsys):
    monkeypatch.chdir(unlabelled)
    assert main(["fit", "--config", "quick.yaml", "--data.protocol", "Online", "--data.images_per_task", "8"]) == 0
    found = json.loads((unlabelled / "runs/quick-online/results.json").read_text())
    assert "online" not in found and found["steps"] == 3
    assert "each predicted before" not in capsys.readouterr().out
