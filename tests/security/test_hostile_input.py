"""Configurations and checkpoints are data: they name neither code to import nor functions to call."""

import os
import pickle
import sys

import pytest
import torch

import adaptive_merge as am
from adaptive_merge.__main__ import main
from adaptive_merge.cli import allowlist

EVIL = """
import pathlib
pathlib.Path({sentinel!r}).touch()

import adaptive_merge as am

class Thing(am.LayerWise):
    pass

def call(*arguments, **options):
    pathlib.Path({sentinel!r}).touch()
"""


@pytest.fixture
def work(tmp_path, monkeypatch, suite_folder):
    """A working directory with a module that leaves a trace when it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    (tmp_path / "evil.py").write_text(EVIL.format(sentinel=str(tmp_path / "sentinel")))
    (tmp_path / "base.yaml").write_text(
        f"suite: {{name: {suite_folder}}}\n"
        "model: {recipe: quick, coefficients: LayerWise}\n"
        "trainer: {max_steps: 1, accelerator: cpu, enable_progress_bar: false}\n"
    )
    return tmp_path


def refused(work, *arguments):
    code = main(["fit", "--config", "base.yaml", *arguments])
    return code == 2 and not (work / "sentinel").exists() and "evil" not in sys.modules and not (work / "runs").exists()


HOSTILE = {
    "class": "model: {coefficients: {class_path: evil.Thing}}",
    "attribute of a module of ours": "model: {coefficients: {class_path: adaptive_merge.files.os.system}}",
    "callback": "trainer: {callbacks: [{class_path: evil.Thing}]}",
    "callable": "trainer: {callbacks: [{class_path: LambdaCallback, init_args: {on_fit_start: os.system}}]}",
    "callable by another way": "trainer: {callbacks: {class_path: LambdaCallback, init_args: {setup: evil.call}}}",
    "logger": "trainer: {logger: {class_path: evil.call}}",
    "strategy": "trainer: {strategy: {class_path: subprocess.Popen, init_args: {args: [touch, sentinel]}}}",
    "plugin": "trainer: {plugins: [{class_path: evil.Thing}]}",
    "adapter": "model: {adapters: [{class_path: evil.Thing}]}",
    "transform": "model: {transforms: [{class_path: jsonargparse.set_parsing_settings}]}",
    "tag": "model: {recipe: !!python/object/apply:os.system ['touch sentinel']}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_configuration_names_nothing_outside_the_list(work, capsys, name):
    (work / "hostile.yaml").write_text(HOSTILE[name])
    assert refused(work, "--config", "hostile.yaml")
    assert "Traceback" not in capsys.readouterr().err


def test_the_command_line_neither(work, capsys):
    assert refused(work, "--model.coefficients", "evil.Thing")
    assert "--allow-import PACKAGE" in capsys.readouterr().err


def test_allow_import_opens_it_for_one_call(work, monkeypatch):
    wanted = ["fit", "--config", "base.yaml", "--model.coefficients", "evil.Thing", "--print_config"]
    for arguments, variable in ((["--allow-import", "evil"], ""), (["--allow-import=evil"], ""), ([], "other, evil")):
        monkeypatch.setenv(allowlist.VARIABLE, variable)
        with pytest.raises(SystemExit) as ended:
            main([*wanted, *arguments])
        assert ended.value.code == 0
    monkeypatch.delenv(allowlist.VARIABLE)
    assert main(wanted) == 2


def test_what_cannot_be_opened_is_named(work, capsys):
    assert main(["--allow-import", "not a package", "fit"]) == 2
    assert main(["fit", "--allow-import", "jsonargparse"]) == 2
    assert "jsonargparse" in capsys.readouterr().err


class Payload:
    """A pickle that would run a command."""

    def __reduce__(self):
        return os.system, ("touch sentinel",)


@pytest.fixture
def checkpoint(work):
    """A true checkpoint, to be forged."""
    assert main(["fit", "--config", "base.yaml", "--run.root", "true"]) == 0
    return torch.load("true/quick/checkpoints/last.ckpt", weights_only=True)


def test_forged_checkpoints_run_nothing(work, checkpoint, capsys):
    forged = {
        "_class_path": checkpoint | {"hyper_parameters": {"_class_path": "evil.Thing", "_instantiator": "evil.call"}},
        "hyper-parameters": checkpoint | {"hyper_parameters": {"coefficients": {"class_path": "evil.Thing"}}},
    }
    for content in forged.values():
        # Its settings are not looked at: it resumes what the configuration says.
        torch.save(content, "forged.ckpt")
        arguments = ["--ckpt_path", "forged.ckpt", "--run.if_exists", "overwrite"]
        assert main(["fit", "--config", "base.yaml", *arguments]) == 0
        assert not (work / "sentinel").exists() and "evil" not in sys.modules
        assert "evil" not in (work / "runs" / "quick" / "config.yaml").read_text()
    torch.save(checkpoint | {"callbacks": Payload()}, "payload.ckpt")
    (work / "plain.ckpt").write_bytes(pickle.dumps(Payload()))
    for name in ("payload.ckpt", "plain.ckpt"):
        assert main(["fit", "--config", "base.yaml", "--ckpt_path", name, "--run.root", "other"]) == 2
        assert main(["inspect", name]) == 2
        assert not (work / "sentinel").exists()
    assert "Traceback" not in capsys.readouterr().err


def test_lightnings_own_loading_refuses_a_forged_instantiator(work, checkpoint):
    torch.save(checkpoint | {"hyper_parameters": {"_instantiator": "evil.call"}}, "forged.ckpt")
    with pytest.raises(ValueError, match="not in the allowlist"):
        am.AdaptiveMerge.load_from_checkpoint("forged.ckpt", weights_only=True)
    assert not (work / "sentinel").exists()
