"""CLIP suites: checkpoints in strangers' formats and data sets on disk become one suite, or one named error."""

from __future__ import annotations

import json
import os
import re
import time

import open_clip
import pytest
import torch
from data.data_sets import WRITERS, save
from torch.nn import functional as F

import adaptive_merge as am
from adaptive_merge.cli.data import data as data_command
from adaptive_merge.suites.check import check_suite
from adaptive_merge.suites.clip_folder import load_clip_folder

VISION = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32}
TEXT = {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
CONFIG = {"embed_dim": 24, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT}
TASKS = ("MNIST", "EuroSAT", "birds")


def build(seed, quick_gelu=True, **vision):
    torch.manual_seed(seed)
    return open_clip.CLIP(24, VISION | vision, TEXT, quick_gelu=quick_gelu).eval()


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A pre-trained CLIP, three experts in three formats, and three data sets."""
    folder = tmp_path_factory.mktemp("clip")
    models = {task: build(seed) for seed, task in enumerate(("pretrained", *TASKS))}
    (folder / "architecture.json").write_text(json.dumps(CONFIG))
    torch.save(models["pretrained"].state_dict(), folder / "pretrained.pt")
    torch.save(models["MNIST"].visual.state_dict(), folder / "MNIST.pt")
    torch.save(
        {f"model.visual.{k}": v for k, v in models["EuroSAT"].visual.state_dict().items()}, folder / "EuroSAT.pt"
    )
    torch.save(models["birds"].state_dict(), folder / "birds.pt")
    for name in ("MNIST", "EuroSAT"):
        WRITERS[name](folder / "data")
    for index in range(8):
        save(folder / "birds" / ("owl", "jay_bird")[index % 2] / f"{index}.png", index)
    return folder, models


@pytest.fixture
def suite(material, tmp_path):
    """`suite.json` in a folder of its own, with changes."""

    def write(**changes):
        content = {
            "kind": "clip",
            "architecture": f"{material[0]}/architecture.json",
            "pretrained": f"{material[0]}/pretrained.pt",
            "experts": f"{material[0]}/{{task}}.pt",
            "tasks": list(TASKS),
            "data": f"{material[0]}/data",
            "folders": {"birds": f"{material[0]}/birds"},
            "sizes": "any",
        }
        content |= changes
        content = {key: value for key, value in content.items() if value is not ...}
        (tmp_path / "suite.json").write_text(json.dumps(content))
        return tmp_path

    return write


def load(folder, tasks=None, split="test"):
    return load_clip_folder(folder, json.loads((folder / "suite.json").read_text()), tasks, split)


def test_everything_fits_together(suite, material):
    found, models = load(suite()), material[1]
    assert found.task_vectors.tasks == TASKS and list(found.images) == list(TASKS)
    batch = found.images["birds"].take(torch.arange(8))
    module = am.AdaMerging(found.task_vectors, found.backbone, found.heads)
    clip = models["birds"]
    tokenizer = open_clip.SimpleTokenizer(context_length=32)
    with torch.no_grad(), module.viewing("individual"):
        features = module.model.backbone(batch, found.task_vectors.expert("birds"))
        wanted = clip.encode_image(module.model.backbone.normalise(batch))
        texts = models["pretrained"].encode_text(tokenizer(["a photo of a jay bird.", "a photo of a owl."]))
        head = models["pretrained"].logit_scale.exp() * F.normalize(texts, dim=-1)
    assert torch.allclose(features, wanted, atol=1e-5)
    assert torch.allclose(found.heads["birds"], head, atol=1e-4)
    assert found.images["birds"].labels.tolist() == [0] * 4 + [1] * 4
    assert len(found.heads["EuroSAT"]) == 10 and found.backbone.image_mean == open_clip.OPENAI_DATASET_MEAN
    found.backbone.load_state_dict(module.merged_state_dict())
    assert torch.equal(found.task_vectors.pretrained[:64], models["pretrained"].visual.class_embedding.detach())


def test_tasks_are_chosen_by_name_and_order(suite):
    assert load(suite(), ["birds", "MNIST"]).task_vectors.tasks == ("birds", "MNIST")
    with pytest.raises(am.InputError, match="no task 'bird'; did you mean 'birds'"):
        load(suite(), ["bird"])
    with pytest.raises(am.InputError, match="no split 'val'"):
        load(suite(), split="val")


def test_one_expert_is_read_at_a_time(suite, monkeypatch):
    from adaptive_merge.suites import clip_suite

    alive, most = [], []
    read = clip_suite.read_weights

    def counting(path, **settings):
        import weakref

        weights = read(path, **settings)
        alive.append(weakref.ref(weights.tensors["proj"]))
        most.append(sum(ref() is not None for ref in alive))
        return weights

    monkeypatch.setattr(clip_suite, "read_weights", counting)
    load(suite())
    assert len(most) == 4 and max(most) <= 3  # the pre-trained one, the one just read, the one before it


def test_a_bank_folder_keeps_what_experts_came_to_and_what_was_said_of_them(
    suite, material, tmp_path, monkeypatch, caplog
):
    from adaptive_merge.suites import clip_suite

    read, paths = clip_suite.read_weights, []
    monkeypatch.setattr(clip_suite, "read_weights", lambda path, **own: paths.append(path) or read(path, **own))
    for path in material[0].glob("*.pt"):
        os.utime(path, (time.time() - 60,) * 2)
    folder, found, said = suite(), [], []
    for _ in range(2):
        caplog.clear()
        found.append(am.load_suite(str(folder), banks=str(tmp_path / "banks")))
        said.append(caplog.messages)
    assert len(paths) == 5 and paths[4] == paths[0] == str(material[0] / "pretrained.pt")
    assert torch.equal(found[0].task_vectors.vectors, found[1].task_vectors.vectors)
    assert said[0] == said[1] and {k: list(v) for k, v in found[0].notes.items()} == found[1].notes


def test_published_heads_and_bfloat16(suite, material, tmp_path):
    for task, classes in (("MNIST", 10), ("EuroSAT", 10), ("birds", 2)):
        torch.save({"weight": torch.randn(classes, 24), "bias": torch.zeros(classes)}, tmp_path / f"head_{task}.pt")
    found = load(suite(heads="head_{task}.pt", bank="bfloat16"))
    assert found.heads["birds"].shape == (2, 24) and found.task_vectors.vectors.dtype == torch.bfloat16
    torch.save({"weight": torch.randn(3, 24)}, tmp_path / "head_birds.pt")
    with pytest.raises(am.InputError, match="head_birds.pt.*expected 2 classes .* found 3"):
        load(suite(heads="head_{task}.pt"))


def test_environment_variables_and_relative_paths(suite, material, monkeypatch):
    changes = {"data": "$CLIP_TEST_DATA/data", "pretrained": "../pretrained.pt"}
    with pytest.raises(am.InputError, match="CLIP_TEST_DATA.*not set"):
        load(suite(**changes))
    monkeypatch.setenv("CLIP_TEST_DATA", str(material[0]))
    with pytest.raises(am.MissingFileError, match="pretrained.pt.*is not there"):
        load(suite(**changes))
    assert load(suite(data=changes["data"]), ["MNIST"]).name == suite().name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "ViT-B-32-quickgeli"}, "no architecture.*did you mean 'ViT-B-32-quickgelu'"),
        ({"architecture": "RN50"}, "expected a plain CLIP vision transformer"),
        (
            {"architecture": "ViT-B-32-quickgelu"},
            "pretrained.pt`: does not fit `ViT-B-32-quickgelu`: width: expected 768, found 64",
        ),
        ({"architecture": ...}, "'architecture' is missing"),
        ({"expert": "x"}, "unknown key 'expert'; did you mean 'experts'"),
        ({"tasks": "MNIST"}, r"tasks: expected list\[str\], found 'MNIST'"),
        ({"tasks": ["MNIST", "MNIST"]}, "each named once"),
        ({"experts": "somewhere.pt"}, "no `{task}` in it"),
        ({"experts": {"MNIST": "a.pt"}}, "no path for task 'EuroSAT'"),
        ({"experts": "{task}.gone.pt"}, "MNIST.gone.pt.*the expert of task 'MNIST' is not there"),
        ({"sizes": "published"}, "task 'MNIST'.*found 6 test images.*10,000"),
        ({"sizes": "some"}, "unknown sizes 'some'"),
        ({"tasks": ["MNIST", "dogs"]}, "no data set 'dogs'"),
        ({"folders": {"birds": "nowhere"}}, "nowhere.*no such folder"),
        ({"text": "{0}/MNIST.pt"}, "text tower.*give a full open_clip CLIP"),
    ],
)
def test_mistakes_are_named(suite, material, changes, message):
    changes = {key: value.format(material[0]) if key == "text" else value for key, value in changes.items()}
    with pytest.raises(am.AdaptiveMergeError, match=message):
        load(suite(**changes))


def test_another_activation_is_refused(suite, material, tmp_path):
    (tmp_path / "gelu").mkdir()
    model = build(9, quick_gelu=False)
    from safetensors.torch import save_file

    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "gelu" / "open_clip_model.safetensors"
    )
    content = {"model_cfg": CONFIG | {"quick_gelu": False}, "preprocess_cfg": {}}
    (tmp_path / "gelu" / "open_clip_config.json").write_text(json.dumps(content))
    experts = {task: f"{material[0]}/{task}.pt" for task in TASKS} | {"birds": "gelu"}
    with pytest.raises(am.InputError, match="QuickGELU"):
        load(suite(experts=experts))


def test_data_check_says_what_is_wrong_with_which_task(suite, material, capsys):
    assert [row.problem for row in check_suite(str(suite()))] == [None] * 3
    data_command(["check", str(suite()), "--decode"])
    assert "birds" in capsys.readouterr().out
    folder = suite(tasks=[*TASKS, "DTD"], sizes="published")
    found = {row.task: row for row in check_suite(str(folder))}
    assert "10,000" in found["MNIST"].problem and found["birds"].problem is None and found["birds"].images == 8
    assert "dtd/test" in found["DTD"].problem
    with pytest.raises(am.InputError, match="3 of 4 tasks cannot be used yet: MNIST, EuroSAT, DTD"):
        data_command(["check", str(folder)])


def test_names_are_text_and_no_markup(suite, material, capsys):
    with pytest.raises(am.InputError, match="1 of 1"):
        data_command(["check", str(suite(tasks=["birds"], folders={"birds": "[/red]nowhere"}))])
    assert "[/red]nowhere" in re.sub(r"[\s│]+", "", capsys.readouterr().out)


def test_data_check_of_a_configuration(tmp_path, suite_folder, capsys):
    (tmp_path / "run.yaml").write_text(f"suite: {{name: {suite_folder}}}\n")
    data_command(["check", "--config", str(tmp_path / "run.yaml")])
    assert "green" in capsys.readouterr().out
    with pytest.raises(am.MissingFileError, match="gone.yaml"):
        data_command(["check", "--config", str(tmp_path / "gone.yaml")])
