import csv
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import write_manifest
from fitting import QUICK
from safetensors.torch import load_file, save_file

import adaptive_merge as am
from adaptive_merge.__main__ import main
from adaptive_merge.suites.embedded_tower import build_encoder


@pytest.fixture
def work(tmp_path, monkeypatch, suite_folder):
    """An empty working directory with a quick configuration over the toy suite."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick.yaml").write_text(f"suite: {{name: {suite_folder}}}" + QUICK)
    return tmp_path


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_fit_writes_a_run_and_the_same_seed_the_same_results(work, capsys):
    assert main(["fit", "--config", "quick.yaml"]) == 0
    assert "average" in capsys.readouterr().out
    run = work / "runs" / "quick"
    first = results(run)
    assert first["schema"] == 1 and first["recipe"] == "quick" and first["steps"] == 3
    assert set(first["tasks"]["red"]) == {"n", "pretrained", "individual", "initial", "adapted"}
    assert first["tasks"]["red"]["n"] == 24 and first["trainable_parameters"] == 3 * len(
        list(build_encoder().parameters())
    )
    assert all(0 <= value <= 1 for value in first["average"].values())
    assert (run / "checkpoints" / "last.ckpt").stat().st_size < 50_000
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert sum(bool(row["train/loss"]) for row in rows) == 3
    assert main(["fit", "--config", str(run / "config.yaml"), "--run.name", "again"]) == 0
    second = results(work / "runs" / "again")
    assert (second["tasks"], second["experts"]) == (first["tasks"], first["experts"])


def test_a_run_is_not_overwritten_unless_asked(work, capsys):
    assert main(["fit", "--config", "quick.yaml"]) == 0
    before = (work / "runs" / "quick" / "results.json").read_bytes()
    assert main(["fit", "--config", "quick.yaml"]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (work / "runs" / "quick" / "results.json").read_bytes() == before
    assert main(["fit", "--config", "quick.yaml", "--run.if_exists", "overwrite", "--suite.tasks", "[grey]"]) == 2
    assert (work / "runs" / "quick" / "results.json").read_bytes() == before
    assert main(["fit", "--config", "quick.yaml", "--run.if_exists", "overwrite"]) == 0


def test_resume_goes_on_from_the_last_checkpoint(work):
    assert main(["fit", "--config", "quick.yaml", "--trainer.max_steps", "6", "--run.name", "whole"]) == 0
    assert main(["fit", "--config", "quick.yaml"]) == 0
    assert main(["fit", "--config", "quick.yaml", "--trainer.max_steps", "6", "--run.if_exists", "resume"]) == 0
    values = [
        torch.load(work / "runs" / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "quick")
    ]
    assert all(torch.equal(values[0][key], values[1][key]) for key in values[0])
    assert results(work / "runs" / "quick")["steps"] == 6


def test_merge_writes_the_adapted_and_the_static_merge(work, suite_folder, capsys):
    assert main(["fit", "--config", "quick.yaml", "--model.lr", "0.1"]) == 0
    assert main(["merge", "runs/quick", "--output", "adapted.safetensors"]) == 0
    assert main(["merge", "quick.yaml", "--output", "static.safetensors"]) == 0
    adapted, static = load_file("adapted.safetensors"), load_file("static.safetensors")
    build_encoder().load_state_dict(static)
    suite = am.load_suite(str(suite_folder))
    expected = am.TaskArithmetic(suite.task_vectors, suite.backbone, suite.heads).merged_state_dict()
    assert all(torch.equal(static[name], expected[name]) for name in expected)
    assert any(not torch.equal(static[name], adapted[name]) for name in expected)
    capsys.readouterr()
    assert main(["inspect", "adapted.safetensors", "--json"]) == 0
    assert '"recipe": "quick"' in capsys.readouterr().out
    assert main(["inspect", "adapted.safetensors"]) == 0
    told = capsys.readouterr().out
    assert "recipe" in told and "quick" in told and "float32" in told.lower().replace("f32", "float32")


def test_static_recipe_scores_without_a_step(work, capsys, recwarn):
    assert main(["fit", "--config", "quick.yaml", "--model.coefficients", "Fixed", "--trainer.max_steps", "0"]) == 0
    average = results(work / "runs" / "quick")["average"]
    assert average["adapted"] == average["initial"]
    assert "A static recipe, no step, nothing was trained" in " ".join(capsys.readouterr().out.split())
    assert not [warned for warned in recwarn if "no optimizer" in str(warned.message)]


def test_validate_prints_accuracies(work, capsys):
    assert main(["validate", "--config", "quick.yaml"]) == 0
    told = capsys.readouterr().out
    assert all(word in told for word in ("accuracy, %", "ece, %", "red", "average")) and "DataLoader" not in told
    assert main(["validate", "--config", "quick.yaml", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert f"{100 * scores['adapted/red/accuracy']:.1f}" in told and "adapted/accuracy" in scores
    assert not (work / "runs").exists()


def test_inspect_describes_runs_and_banks(work, suite_folder, capsys):
    assert main(["fit", "--config", "quick.yaml"]) == 0
    capsys.readouterr()
    assert main(["inspect", "runs/quick"]) == 0
    told = capsys.readouterr().out
    assert "pre-trained" in told and "checkpoint · step" in told and "measures · " in told
    assert main(["inspect", "runs/quick", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["checkpoint"]["step"] == 3 and "model.backbone.coefficients.values" in told["checkpoint"]["tensors"]
    am.load_suite(str(suite_folder)).task_vectors.save("bank.safetensors")
    assert main(["inspect", "bank.safetensors", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metadata"]["adaptive_merge.task_vectors"]["tasks"] == [
        "red",
        "green",
        "blue",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.lrr", "1"], "lrr"),
        (["--model.coefficients", "LayersWise"], "LayersWise"),
        (["--suite.name", "nowhere"], "nowhere/suite.json"),
        (["--suite.tasks", "[red, grean]"], "no task 'grean'; did you mean 'green'"),
        (["--suite.tasks", "[]"], "no task is left"),
        (["--suite.split", "val"], "'val' is not in this suite"),
        (["--model.coefficients", "Fixed"], "nothing to learn"),
        (["--model.coefficients.init", "[0.1, 0.2]"], "2 start coefficients for 3 experts"),
        (["--ckpt_path", "gone.ckpt"], "gone.ckpt"),
        (["--data.images_per_task", "0"], "at least one image"),
    ],
)
def test_bad_arguments_end_with_one_message_and_nothing_written(work, capsys, arguments, message):
    assert main(["fit", "--config", "quick.yaml", *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told
    assert sorted(path.name for path in work.iterdir()) == ["quick.yaml"]


def _edit_expert(folder, change):
    path = folder / "experts" / "green.safetensors"
    state = load_file(path)
    change(state)
    save_file({name: value.contiguous() for name, value in state.items()}, path)


def _missing(folder):
    _edit_expert(folder, lambda state: state.pop("proj"))


def _surplus(folder):
    _edit_expert(folder, lambda state: state.update(surplus=torch.zeros(1)))


def _transposed(folder):
    _edit_expert(
        folder,
        lambda state: state.update(
            {"transformer.resblocks.0.mlp.c_fc.weight": state["transformer.resblocks.0.mlp.c_fc.weight"].T}
        ),
    )


def _nan(folder):
    _edit_expert(folder, lambda state: state["proj"].fill_(float("nan")))


def _narrow_head(folder):
    heads = load_file(folder / "heads.safetensors")
    save_file(heads | {"green.weight": heads["green.weight"][:, :64].contiguous()}, folder / "heads.safetensors")


def _few_classes(folder):
    heads = load_file(folder / "heads.safetensors")
    save_file(heads | {"green.weight": heads["green.weight"][:4].contiguous()}, folder / "heads.safetensors")


def _empty(folder):
    np.savez(
        folder / "images" / "green.npz", test_images=np.zeros((0, 32, 32), np.uint8), test_labels=np.zeros(0, np.int64)
    )


def _gone(folder):
    (folder / "experts" / "green.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_missing, "'proj' is missing"),
        (_surplus, "'surplus' is not in"),
        (_transposed, "looks transposed"),
        (_nan, "NaN"),
        (_narrow_head, "the backbone gives 128 features"),
        (_few_classes, "has 4 classes, suite.json names 5"),
        (_empty, "data set is empty"),
        (_gone, "it is not there"),
    ],
)
def test_damaged_suites_are_refused_by_name(work, suite_folder, capsys, damage, message):
    folder = work / "suite"
    shutil.copytree(suite_folder, folder)
    damage(folder)
    write_manifest(folder)
    assert main(["fit", "--config", "quick.yaml", "--suite.name", str(folder)]) == 2
    told = capsys.readouterr().err
    assert message in told and "green" in told and "Traceback" not in told
    assert not (work / "runs").exists()


def test_a_file_that_is_not_the_one_in_the_manifest_is_refused(work, suite_folder, capsys):
    folder = work / "suite"
    shutil.copytree(suite_folder, folder)
    _nan(folder)
    assert main(["fit", "--config", "quick.yaml", "--suite.name", str(folder)]) == 2
    assert "sha256" in capsys.readouterr().err


def test_debug_shows_the_traceback(work):
    with pytest.raises(am.InputError):
        main(["fit", "--config", "quick.yaml", "--suite.tasks", "[grey]", "--debug"])


def test_version_does_not_import_torch():
    import subprocess
    import sys

    code = "import sys; from adaptive_merge.__main__ import main; main(['--version']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("adaptive-merge ")


NO_CONFIGURATIONS = {
    "notes.txt": "some notes\nof mine\n",
    "mapping.txt": "title: a\nbody: b\n",
    "table.csv": "a,b\n1,2\n",
    "list.yaml": "- a\n- b\n",
    "empty.yaml": "",
    "nothing.yaml": "{}\n",
    "number.yaml": "3\n",
    "typo.yaml": "modle: {recipe: x}\n",
    "typo beside.yaml": "model: {recipe: x}\nmodle: {}\n",
    "null.yaml": "modle:\nmodel: {recipe: x}\n",
    "inner typo.yaml": "model: {lrr: 1}\n",
    "trainer typo.yaml": "trainer: {max_stepz: 1}\n",
    "run typo.yaml": "run: {nmae: x}\n",
    "suite typo.yaml": "suite: {nmae: embedded}\n",
    "data typo.yaml": "data: {images_per_tsk: 1}\n",
    "wrong kind.yaml": "model: {lr: fast}\n",
    "package.json": '{"name": "x", "version": "1.0.0"}\n',
    "bytes.yaml": "\x00\x01",
}


@pytest.mark.parametrize("name", NO_CONFIGURATIONS)
@pytest.mark.parametrize("command", ["merge", "export"])
def test_what_is_no_configuration_is_no_merge(work, capsys, name, command):
    (work / name).write_text(NO_CONFIGURATIONS[name])
    rest = {"merge": ["--output", "out"], "export": ["--format", "safetensors", "--output", "out"]}[command]
    assert main([command, name, *rest]) == 2
    told = capsys.readouterr()
    assert not (work / "out").exists() and told.err.startswith("adaptive-merge: ") and "wrote" not in told.out


def test_a_misspelt_group_gets_its_neighbour(work, capsys):
    (work / "typo.yaml").write_text("modle: {}\n")
    assert main(["merge", "typo.yaml"]) == 2
    assert "Option 'modle' is not accepted; did you mean 'model'?" in capsys.readouterr().err


def test_configurations_with_all_that_fit_takes_are_merged(work):
    (work / "more.yaml").write_text(
        "trainer: {max_steps: 3, logger: false}\nrun: {name: x}\nckpt_path: null\nweights_only: true\n"
    )
    assert main(["merge", "quick.yaml", "more.yaml", "--output", "out"]) == 0


ADAPTED = QUICK.replace("trainer", "  adapters: [{class_path: FeatureSurgery, init_args: {rank: 2}}]\ntrainer")


def test_merge_says_what_it_leaves_out(work, suite_folder, capsys):
    assert main(["merge", "quick.yaml", "--output", "plain"]) == 0
    assert "left out" not in capsys.readouterr().out
    (work / "adapted.yaml").write_text(f"suite: {{name: {suite_folder}}}" + ADAPTED)
    assert main(["merge", "adapted.yaml", "--output", "adapted"]) == 0
    told = capsys.readouterr().out
    assert "left out: FeatureSurgery" in told and "adaptive-merge export adapted.yaml --format safetensors" in told
    assert main(["export", "adapted.yaml", "--format", "safetensors", "--output", "folder"]) == 0  # as it says
    assert (work / "folder" / "adapters.safetensors").is_file()
