"""The command line as a whole: what it lists, how fast, and what it says to a slip of the finger."""

import json
import shutil
import subprocess
import sys
import zipfile

import pytest

import adaptive_merge as am
from adaptive_merge.__main__ import main
from adaptive_merge.cli.loading import load_run
from adaptive_merge.cli.table import COMMANDS, command

QUICK = """
model: {recipe: quick, coefficients: LayerWise}
trainer: {max_steps: 1, accelerator: cpu, enable_progress_bar: false}
run: {report: false}
"""


@pytest.fixture
def work(tmp_path, monkeypatch, suite_folder):
    """A working directory with a copy of the toy suite, which may be damaged, and a quick configuration over it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(suite_folder, "suite")
    (tmp_path / "quick.yaml").write_text("suite: {name: suite}" + QUICK)
    return tmp_path


def alone(code):
    """Standard output of a process of its own, and which of the heavy packages it imported."""
    ending = "\nimport json\nprint(json.dumps([m for m in ('torch', 'pytorch_lightning') if m in sys.modules]))"
    start = "import sys\nfrom adaptive_merge.__main__ import main\n"
    done = subprocess.run([sys.executable, "-c", start + code + ending], capture_output=True, text=True, check=True)
    *lines, modules = done.stdout.splitlines()
    return lines, json.loads(modules)


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_lists_every_command_without_torch(argument):
    lines, modules = alone(f"main([{argument!r}])")
    assert modules == []
    if argument == "--help":
        listed = [line.split()[0] for line in lines if line.startswith("  ") and not line.startswith("  --")]
        assert listed == list(COMMANDS)


def test_recipes_are_listed_without_torch():
    lines, modules = alone("main(['recipes'])")
    assert modules == [] and {"adamerging", "best", "clip/symerge", "clip/vit_l_14/20tasks"} <= set(lines)


def test_a_run_is_inspected_without_lightning(work):
    assert main(["fit", "--config", "quick.yaml"]) == 0
    lines, modules = alone("main(['inspect', 'runs/quick', '--json'])")
    assert "pytorch_lightning" not in modules and json.loads("\n".join(lines))["checkpoint"]["step"] == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_each_name_leads_to_a_function(name):
    assert callable(command(name))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fitt"], "did you mean 'fit'"),
        (["merge", "--ouput", "x", "quick.yaml"], "did you mean '--output'"),
        (["merge", "--out", "x", "quick.yaml"], "unrecognized arguments: --out"),
        (["tune", "--config", "quick.yaml", "--var", "model.lr=1"], "nothing to tune"),
        (["fit", "--config", "quick.yaml", "--trainer.max_step", "3"], "did you mean '--trainer.max_steps'"),
        (["fit", "--config", "quick.yaml", "--model.coefficients", "LayerWize"], "did you mean 'LayerWise'"),
        (["fit", "--config", "{model: {lrr: 1}}"], "did you mean 'model.lr'"),
        (["fit", "--config", "quik.yaml"], "did you mean 'quick.yaml'"),
        (["fit", "--config", "adamergin"], "did you mean 'adamerging'"),
        (["merge", "tyes"], "did you mean 'ties'"),
        (["data", "check", "--config", "clip/vit_b_32/8task"], "did you mean 'clip/vit_b_32/8tasks'"),
        ([], "name a command"),
    ],
)
def test_a_slip_is_answered_with_the_nearest_name(work, capsys, arguments, message):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and not (work / "runs").exists()


def test_load_run_reads_no_image(work):
    assert main(["fit", "--config", "quick.yaml"]) == 0
    shutil.rmtree("suite/images")
    for sources in (["runs/quick"], ["quick.yaml"]):
        assert len(load_run(*sources).merged_state_dict()) == 61
    with pytest.raises(am.MissingFileError, match="images"):
        am.load_suite("suite")
    assert main(["fit", "--config", "quick.yaml", "--run.name", "other"]) == 2


def test_a_run_folder_stands_alone(work, capsys):
    assert main(["fit", "--config", "quick.yaml"]) == 0
    assert main(["merge", "runs/quick", "quick.yaml"]) == 2
    assert "stands alone" in capsys.readouterr().err


@pytest.mark.slow
def test_the_wheel_carries_the_recipes(tmp_path, monkeypatch):
    pytest.importorskip("hatchling")
    from hatchling.build import build_wheel

    monkeypatch.chdir(__file__.rpartition("/tests/")[0])
    names = zipfile.ZipFile(tmp_path / build_wheel(str(tmp_path))).namelist()
    for name in ("embedded/adamerging.yaml", "clip/symerge.yaml", "clip/vit_l_14/20tasks/suite.json"):
        assert f"adaptive_merge/configs/{name}" in names
