"""configs/clip/: methods and suites in two layers, and what each pair comes to."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from adaptive_merge.cli.configs import find_config, layered, read_layers, recipe_files, suite_name
from adaptive_merge.cli.grid import _Settings
from adaptive_merge.files import shipped
from adaptive_merge.suites.clip_folder import read_clip_suite
from adaptive_merge.suites.clip_tasks import TEST_SIZES, layout_of
from adaptive_merge.suites.loading import folder_of

NAMES = [name for name in recipe_files() if name.startswith("clip/")]
METHODS = [name for name in NAMES if name.count("/") == 1]
SUITES = [name for name in NAMES if name.count("/") == 2]
STEPS = {"tinting": 500, "tinting_pp": 500, "symerge": 500}
BASES = {"mass": 1.0, "smile": 0.0}
ENTRIES = {"vit_b_32": 113_448_705, "vit_b_16": 111_792_129, "vit_l_14": 342_562_049}


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty folder: nothing is found but what ships."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("suite", SUITES)
def test_every_pair_has_the_settings_of_its_suite(elsewhere, suite):
    _, backbone, size = suite.split("/")
    tasks = int(size.removesuffix("tasks"))
    for method in METHODS:
        name = method.removeprefix("clip/")
        for pair in ([method, suite], [suite, method]):
            settings: dict = {}
            for layer in read_layers(pair):
                settings |= layer.settings
            text, model = json.dumps(settings), settings["model"]
            init = 0.0 if name == "kl_adamerging" else BASES.get(name, 0.3 if tasks == 8 else 0.1)
            assert model["coefficients"]["init_args"]["init"] in ("average", init)
            assert set(re.findall(r'"counted_over": (\d+)', text)) <= {str(ENTRIES[backbone])}
            assert "by_suite" not in settings and suite_name(pair) == f"configs/{suite}"
            if name in STEPS:
                assert settings["trainer"]["max_steps"] == STEPS[name] * tasks
            if name == "surgery_v2":
                assert model["adapters"][0]["init_args"]["rank"] == (4 if backbone == "vit_l_14" else 16)


def test_all_methods_and_suites_are_there():
    assert len(METHODS) == 21 and len(SUITES) == 9


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
def test_the_command_line_takes_the_pair_and_what_comes_later_wins(elsewhere):
    pair = ["--config", "clip/tinting", "--config=clip/vit_l_14/14tasks"]
    settings = _Settings(args=["fit", *pair]).settings
    assert settings.run.name == "vit_l_14-14tasks-tinting" and settings.trainer.max_steps == 7000
    assert settings.model.coefficients.init_args.init == 0.1 and settings.model.lr == 0.01
    settings = _Settings(args=["fit", *pair, "--trainer.max_steps", "5", "--run.name", "{recipe}-5"]).settings
    assert settings.trainer.max_steps == 5 and settings.run.name == "tinting-5"


def test_a_suite_on_the_command_line_counts_as_well(elsewhere):
    arguments = layered(["--config", "clip/adamerging", "--suite.name", "clip/vit_b_32/20tasks"])
    assert yaml.safe_load(arguments[1])["model"]["coefficients"]["init_args"]["init"] == 0.1


def test_a_path_wins_over_a_name(elsewhere, tmp_path):
    assert find_config("ties") == shipped() / "embedded" / "ties.yaml"
    (tmp_path / "ties").write_text("model: {recipe: mine}")
    assert read_layers(["ties"])[0].settings == {"model": {"recipe": "mine"}}


@pytest.mark.parametrize("suite", SUITES)
def test_each_suite_is_one_that_the_reader_takes(elsewhere, suite, monkeypatch):
    monkeypatch.setenv("CLIP_CHECKPOINTS", "/checkpoints")
    monkeypatch.setenv("CLIP_DATA", "/data")
    folder = folder_of(suite)
    assert folder == folder_of(f"configs/{suite}")
    clip = read_clip_suite(folder, json.loads((folder / "suite.json").read_text()))
    assert f"{len(clip.tasks)}tasks" == folder.name and clip.architecture.endswith("-quickgelu")
    assert clip.expert_path("MNIST").startswith("/checkpoints/") and clip.data == "/data"


def test_the_readme_names_every_data_set():
    page = (shipped() / "clip" / "README.md").read_text()
    for task, sizes in TEST_SIZES.items():
        counts = " or ".join(f"{size:,}" for size in sizes)
        assert f"| {task} | {counts} | {layout_of(task).replace('|', '/')} |" in page
