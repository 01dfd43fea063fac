"""What others refuse, before the first step, is one message that names the argument or file, and leaves nothing."""

import errno
import json
import os
import pwd
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import write_manifest, write_suite
from safetensors.torch import load_file, save_file

import adaptive_merge as am
from adaptive_merge.__main__ import main
from adaptive_merge.cli.door import REPORT, message_of
from adaptive_merge.weights.reader import Reader

QUICK = {
    "model": {"recipe": "quick", "coefficients": {"class_path": "LayerWise"}},
    "trainer": {"max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False},
    "data": {"images_per_task": 4},
    "run": {"report": False},
}


@pytest.fixture
def work(tmp_path, monkeypatch, suite_folder):
    """An empty working directory with a quick configuration over the toy suite."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick.yaml").write_text(yaml.safe_dump({"suite": {"name": str(suite_folder)}} | QUICK))
    return tmp_path


def refusal(capsys, *arguments):
    """The message of a command that the user has to mend: one, and nothing but it."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and error.count("adaptive-merge: ") == 1 and REPORT not in error
    return error[error.index("adaptive-merge: ") :]


TRAINER = [
    ("accelerator gup", "accelerator gup"),
    ("accelerator gpu", "accelerator gpu"),
    ("accelerator tpu", "accelerator tpu"),
    ("accelerator mps", "accelerator mps"),
    ("accelerator CPU-1", "accelerator CPU-1"),
    ("devices 0", "devices 0"),
    ("devices -1", "devices -1"),
    ("devices -2", "devices -2"),
    ("devices two", "devices two"),
    ("devices [0,0]", "devices [0, 0]"),
    ("num_nodes 0", "num_nodes 0"),
    ("num_nodes -3", "num_nodes -3"),
    ("strategy dpp", "strategy dpp"),
    ("strategy fsdp", "strategy fsdp"),
    ("strategy deepspeed", "strategy deepspeed"),
    ("strategy ddp_spawn", "choose ddp"),
    ("strategy ddp_fork", "choose ddp"),
    ("strategy ddp_notebook", "choose ddp"),
    ("strategy ddp_find_unused_parameters_true_spawn", "choose ddp"),
    ("precision float", "expected"),
    ("precision fp8", "expected"),
    ("precision 16-mixd", "did you mean '16-mixed'"),
    ("precision bf16-mix", "did you mean 'bf16-mixed'"),
    ("precision 16-true", "32-true"),
    ("precision bf16-true", "32-true"),
    ("precision 64-true", "32-true"),
    ("precision 64", "32-true"),
    ("precision transformer-engine", "transformer_engine"),
    ("val_check_interval 0.5", "whole number of steps"),
    ("val_check_interval 1.0", "whole number of steps"),
    ("val_check_interval 1.5", "whole number of steps"),
    ("val_check_interval 0", "whole number of steps"),
    ("val_check_interval -1", "whole number of steps"),
    ("check_val_every_n_epoch 0", "val_check_interval"),
    ("overfit_batches 1", "overfit_batches"),
    ("overfit_batches 0.1", "overfit_batches"),
    ("limit_train_batches 0.5", "max_steps"),
    ("limit_val_batches 2.5", "limit_val_batches"),
    ("accumulate_grad_batches 0", "at least 1"),
    ("accumulate_grad_batches -2", "at least 1"),
    ("gradient_clip_val -1", "gradient_clip_val"),
    ("gradient_clip_val .nan", "gradient_clip_val"),
    ("gradient_clip_algorithm nrm", "gradient_clip_algorithm nrm"),
    ("max_time soon", "max_time soon"),
    ("max_steps abc", "expected a whole number"),
    ("max_steps -3", "max_steps -3"),
    ("max_steps 1.5", "expected a whole number"),
    ("max_steps -1", "nothing ends this run"),
    ("max_epochs -2", "max_epochs -2"),
    ("profiler simpel", "profiler simpel"),
    ("plugins foo", "no class 'foo'"),
    ("benchmark maybe", "true or false"),
    ("deterministic warnn", "did you mean 'warn'"),
    ("inference_mode 7", "true or false"),
    ("barebones true", "barebones"),
    ("log_every_n_steps -1", "log_every_n_steps"),
    ("num_sanity_val_steps -1", "num_sanity_val_steps"),
    ("reload_dataloaders_every_n_epochs -1", "reload_dataloaders_every_n_epochs"),
    ("logger MLFlowLogger", "mlflow"),
    ("logger CometLogger", "comet"),
    ("logger TensorBordLogger", "did you mean 'TensorBoardLogger'"),
    ("logger NeptuneLoger", "no class 'NeptuneLoger'"),
    ("logger wandb", "WandbLogger"),
    ("callbacks [EarlyStoping]", "did you mean 'EarlyStopping'"),
    ("callbacks [{class_path: EarlyStopping}]", "required: monitor"),
    ("callbacks [{class_path: EarlyStopping, init_args: {monitr: x}}]", "did you mean 'monitor'"),
    ("callbacks [{class_path: ModelCheckpoint, init_args: {save_top_k: -7}}]", "save_top_k"),
    ("callbacks [{class_path: Guard, init_args: {on_collapse: nothing}}]", "nothing"),
]


@pytest.mark.parametrize(("setting", "message"), TRAINER, ids=[setting for setting, _ in TRAINER])
def test_what_lightning_refuses_is_one_message(work, capsys, setting, message):
    option, _, value = setting.partition(" ")
    error = refusal(capsys, "fit", "--config", "quick.yaml", f"--trainer.{option}={value}")
    assert message in error and len(error) < 1500
    assert [path.name for path in work.iterdir()] == ["quick.yaml"]


SETTINGS = [
    ("--model.coefficients LayersWise", "did you mean 'LayerWise'"),
    ("--model.coefficients layerwise", "did you mean 'LayerWise'"),
    ("--model.coefficients TIES", "'TaskWise'"),
    ("--model.coefficients adaptive_merge.Nope", "Nope"),
    ("--model.coefficients.bounds nonsense", "clamp, project, free"),
    ("--model.coefficients.boundz x", "did you mean 'bounds'"),
    ("--model.coefficients.init nofile.json", "nofile.json"),
    ("--model.adapters [{class_path: FeatureSurgery, init_args: {rank: -1}}]", "rank must be at least 1"),
    ("--model.adapters [{class_path: FeatureSurgery, init_args: {rnk: 3}}]", "did you mean 'rank'"),
    ("--model.adapters [FeatureSurgry]", "did you mean 'FeatureSurgery'"),
    ("--model.adapters FeatureSurgery", "expected a list"),
    ("--model.start FeatCall", "did you mean 'FeatCal'"),
    ("--model.start {class_path: FeatCal, init_args: {strength: -3}}", "-3"),
    ("--model.objective Entropyy", "did you mean 'Entropy'"),
    ("--model.objective 3", "'Entropy'"),
    ("--model.transforms [Tiess]", "did you mean 'Ties'"),
    ("--model.transforms [{class_path: Ties, init_args: {density: 7}}]", "density"),
    ("--model.transforms Ties", "expected a list"),
    ("--model.lr abc", "expected a number"),
    ("--model.accumulate x", "auto, joint, per_task"),
    ("--data.protocol Holdot", "did you mean 'Holdout'"),
    ("--data.protocol {class_path: Holdout, init_args: {share: 7}}", "share"),
    ("--data.protocol {class_path: Unseen, init_args: {tasks: [grey]}}", "grey"),
    ("--data.protocol Unseen", "required: tasks"),
    ("--data.corruption {class_path: Corruption, init_args: {kind: fogg}}", "motion_blur"),
    ("--data.images_per_task 0", "at least one image"),
    ("--data.images_per_task many", "expected a whole number"),
    ("--suite.split train", "test, val"),
    ("--suite.dtype fp16", "float32, bfloat16"),
    ("--suite.tasks red", "expected a list"),
    ("--suite.tasks [red,red]", "named twice"),
    ("--suite.tasks [grean]", "did you mean 'green'"),
    ("--suite.banks quick.yaml", "quick.yaml"),
    ("--model.cache quick.yaml", "quick.yaml"),
    ("--run.if_exists maybe", "refuse, resume, overwrite"),
    ("--run.guard x", "stop, warn, off"),
    ("--run.select best", "agreement"),
    ("--seed_everything -1", "--seed_everything -1"),
    ("--seed_everything 99999999999999999999", "from 0 to 4294967295"),
    ("--seed_everything x", "whole number"),
    ("--model []", "a mapping of settings"),
    ("--trainer 3", "a mapping of settings"),
    ("--run.nme x", "did you mean '--run.name'"),
    ("--conf x", "did you mean '--config'"),
    ("--trainer.max_step 3", "did you mean '--trainer.max_steps'"),
    ("--trainer.max_st 3", "unrecognized arguments"),
    ("--model.coef LayerWise", "unrecognized arguments"),
    ("stray", "unrecognized arguments: stray"),
    ("--run.root quick.yaml", "quick.yaml"),
    ("--run.root /proc/nowhere", "/proc/nowhere"),
    ("--config {model: [1]}", "model: expected a mapping"),
    ("--config {modle: {lr: 1}}", "did you mean 'model.lr'"),
    ("--config /dev/null", "/dev/null"),
    ("--config .", "no such configuration"),
    ("--ckpt_path quick.yaml", "quick.yaml"),
    ("--ckpt_path .", "no such checkpoint"),
]


@pytest.mark.parametrize(("setting", "message"), SETTINGS, ids=[setting for setting, _ in SETTINGS])
def test_a_setting_is_named_with_what_it_may_be(work, capsys, setting, message):
    error = refusal(capsys, "fit", "--config", "quick.yaml", *setting.split(" ", 1))
    assert message in error and len(error) < 1500 and "Union" not in error
    assert [path.name for path in work.iterdir()] == ["quick.yaml"]


@pytest.mark.parametrize(
    ("name", "reason"), [("a\0b", "null byte|printable"), ("x" * 300, "printable"), ("\x1b[31m", "printable")]
)
def test_a_folder_that_cannot_be_is_refused(work, capsys, name, reason):
    error = refusal(capsys, "fit", "--config", "quick.yaml", "--run.name", name)
    assert any(part in error for part in reason.split("|")) and "\x1b" not in error
    assert [path.name for path in work.iterdir()] == ["quick.yaml"]


def test_no_run_folder_is_left_where_the_first_step_is_not_reached(work, capsys):
    stop = "[{class_path: EarlyStopping, init_args: {monitor: nope}}]"
    command = ["fit", "--config", "quick.yaml", "--trainer.callbacks", stop, "--trainer.val_check_interval=1"]
    error = refusal(capsys, *command)
    assert "nope" in error and [path.name for path in work.iterdir()] == ["quick.yaml"]
    (work / "runs" / "quick").mkdir(parents=True)
    (work / "runs" / "quick" / "mine.txt").write_text("mine")
    refusal(capsys, *command)
    assert [str(path.relative_to(work)) for path in sorted((work / "runs").rglob("*"))] == [
        "runs/quick",
        "runs/quick/mine.txt",
    ]


def test_debug_shows_the_cause(work):
    with pytest.raises(am.InputError) as caught:
        main(["fit", "--config", "quick.yaml", "--trainer.accelerator", "gup", "--debug"])
    assert isinstance(caught.value.__cause__, ValueError) and "gup" in str(caught.value.__cause__)


@pytest.mark.parametrize("error", [AttributeError("x"), KeyError("y"), ZeroDivisionError(), AssertionError("z")])
def test_a_fault_of_ours_keeps_its_traceback_and_asks_for_a_report(work, monkeypatch, error):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr("adaptive_merge.cli.merge.load_run", broken)
    monkeypatch.setattr("adaptive_merge.cli.door._package", lambda file: "adaptive_merge")
    with pytest.raises(type(error)) as caught:
        main(["merge", "quick.yaml"])
    assert REPORT in caught.value.__notes__


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), "`/a/b`: No space left on device; make room"),
        (PermissionError(errno.EACCES, "Permission denied", b"/a"), "`/a`: Permission denied; you may not"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error; the disk"),
        (OSError("odd"), "odd; --debug"),
        (MemoryError(), "not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "images_per_task"),
    ],
)
def test_what_the_machine_lacks_is_named_wherever_it_is_met(error, message):
    assert message in message_of(error)


SUITES = {
    "empty": "",
    "cut": '{"tasks": {',
    "a list": "[]",
    "null": "null",
    "NaN": '{"mean": NaN}',
    "latin": b"\xff\xfe",
    "no tasks": {"tasks": None},
    "tasks that are a list": {"tasks": ["red"]},
    "an entry that is a number": {"tasks": {"red": 3}},
    "no classes": {"tasks": {"red": {"classes": []}}},
    "a task that is markup": {"tasks": {"[/red]": {"classes": ["a"]}}},
    "a task that steers terminals": {"tasks": {"\x1b]0;owned\x07": {"classes": ["a"]}}},
    "a task that leads out": {"tasks": {"../red": {"classes": ["a"]}}},
    "a task that is long": {"tasks": {"r" * 1000: {"classes": ["a"]}}},
    "a class that steers terminals": {"tasks": {"red": {"classes": ["\x1b[2J", "b", "c"]}}},
    "a class that is a number": {"tasks": {"red": {"classes": [1, 2, 3]}}},
    "mean is text": {"mean": "0.5"},
    "mean of two": {"mean": [0.5, 0.5]},
    "std of zero": {"std": [0.5, 0, 0.5]},
    "no std": {"std": None},
    "no files": {"files": None},
    "files are a list": {"files": []},
    "another size": {"image_size": 64},
    "a size that is text": {"image_size": "32"},
    "unknown kind": {"kind": "clipp"},
    "a kind that it is not": {"kind": "clip"},
    "no name": {"name": None},
}


@pytest.mark.parametrize("name", SUITES)
def test_a_damaged_suite_json_is_one_message(work, capsys, name):
    folder = work / "suite"
    folder.mkdir()
    write_suite(folder)
    path, change = folder / "suite.json", SUITES[name]
    if isinstance(change, dict):
        content = json.loads(path.read_text()) | change
        change = json.dumps({key: value for key, value in content.items() if value is not None})
    path.write_bytes(change if isinstance(change, bytes) else change.encode())
    for arguments in (["fit", "--config", "quick.yaml", "--suite.name", "suite"], ["data", "check", "suite"]):
        error = refusal(capsys, *arguments)
        assert "\x1b" not in error and ("suite" in error or "tasks cannot be used" in error)
    assert sorted(path.name for path in work.iterdir()) == ["quick.yaml", "suite"]


ARRAYS = {
    "objects": {"test_images": np.array([object()]), "test_labels": np.zeros(1, int)},
    "floats": {"test_images": np.zeros((3, 32, 32)), "test_labels": np.zeros(3, int)},
    "texts as labels": {"test_images": np.zeros((3, 32, 32), np.uint8), "test_labels": np.array(["a", "b", "c"])},
    "complex labels": {"test_images": np.zeros((3, 32, 32), np.uint8), "test_labels": np.zeros(3, complex)},
    "no images": {"test_labels": np.zeros(3, int)},
    "small": {"test_images": np.zeros((3, 16, 16), np.uint8), "test_labels": np.zeros(3, int)},
    "four channels": {"test_images": np.zeros((3, 32, 32, 4), np.uint8), "test_labels": np.zeros(3, int)},
    "no dimension": {"test_images": np.zeros((), np.uint8), "test_labels": np.zeros(3, int)},
    "none": {"test_images": np.zeros((0, 32, 32), np.uint8), "test_labels": np.zeros(0, int)},
}
HEADS = {
    "a vector": torch.zeros(5),
    "a number": torch.zeros(()),
    "whole numbers": torch.zeros(5, 128, dtype=torch.int64),
    "NaN": torch.full((5, 128), float("nan")),
    "narrow": torch.zeros(5, 3),
}


def damage_suite(folder, kind, name):
    if kind == "array":
        np.savez(folder / "images" / "green.npz", **ARRAYS[name])
    elif kind == "head":
        heads = load_file(folder / "heads.safetensors")
        save_file(heads | {"green.weight": HEADS[name]}, folder / "heads.safetensors")
    else:
        path = folder / name
        path.write_bytes({"cut": path.read_bytes()[:300], "empty": b"", "text": b"hello"}[kind])
    write_manifest(folder)


DAMAGE = [("array", name) for name in ARRAYS] + [("head", name) for name in HEADS]
DAMAGE += [(kind, f"{name}") for kind in ("cut", "empty", "text") for name in ("images/green.npz", "experts/green.safetensors", "heads.safetensors")]  # fmt: skip # noqa: E501


@pytest.mark.parametrize(("kind", "name"), DAMAGE, ids=[" ".join(one) for one in DAMAGE])
def test_a_damaged_file_of_a_suite_is_named(work, capsys, kind, name):
    folder = work / "suite"
    folder.mkdir()
    write_suite(folder)
    damage_suite(folder, kind, name)
    error = refusal(capsys, "fit", "--config", "quick.yaml", "--suite.name", "suite")
    assert "green" in error or "heads.safetensors" in error
    assert sorted(path.name for path in work.iterdir()) == ["quick.yaml", "suite"]


@pytest.fixture
def run(work):
    """The folder of a finished run."""
    assert main(["fit", "--config", "quick.yaml"]) == 0
    return work / "runs" / "quick"


DEEP = b"[" * 20_000


def test_damaged_files_of_a_run_are_named_or_left_out(run, capsys):
    for name in ("metrics.csv", "config.yaml", "history.safetensors", "diagnostics.safetensors", "results.json"):
        whole = (run / name).read_bytes()
        for content in (b"", b"\xff\xfe\x00" * 30, whole[: len(whole) // 2], DEEP):
            (run / name).write_bytes(content)
            commands = [["inspect", str(run)], ["choose", str(run)], ["merge", str(run), "--force"]]
            for arguments in [*commands, *([["report", str(run), "--no-tsne"]] if content == DEEP else [])]:
                capsys.readouterr()
                code = main(arguments)
                error = capsys.readouterr().err
                assert code == 0 or (code == 2 and name in error), (name, arguments, error)
        (run / name).write_bytes(whole)


def test_a_damaged_log_does_not_stop_a_resume(run, caplog):
    (run / "metrics.csv").write_bytes(b"\xff\xfe\x00" * 30)
    resume = ["--run.if_exists", "resume", "--trainer.max_steps", "3"]
    assert main(["fit", "--config", "quick.yaml", *resume]) == 0
    assert "metrics.csv is damaged" in caplog.text


VALUES = "model.backbone.coefficients.values"
FORGED = {
    "no state": lambda content: content.pop("state_dict"),
    "a state that is text": lambda content: content.update(state_dict="x"),
    "numbers for tensors": lambda content: content.update(state_dict={"model.x": 3}),
    "a stranger": lambda content: content["state_dict"].update(evil=torch.zeros(1)),
    "no values": lambda content: content["state_dict"].clear(),
    "a narrow value": lambda content: content["state_dict"].update({VALUES: torch.zeros(1)}),
    "a step before the first": lambda content: content.update(global_step=-1),
    "no epoch": lambda content: content.pop("epoch"),
    "loops": lambda content: content.update(loops=3),
    "callbacks": lambda content: content.update(callbacks=[1]),
    "optimiser": lambda content: content.update(optimizer_states=[{}]),
    "two optimisers": lambda content: content.update(optimizer_states=3),
    "schedulers": lambda content: content.update(lr_schedulers=None),
    "version": lambda content: content.update({"pytorch-lightning_version": "x"}),
    "identity": lambda content: content.update(adaptive_merge={}),
    "identity that is text": lambda content: content["adaptive_merge"].update(method="x"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_checkpoint_is_named(run, capsys, name):
    path = run / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    FORGED[name](content)
    torch.save(content, path)
    before = {one: one.read_bytes() for one in run.rglob("*") if one.is_file()}
    error = refusal(capsys, "fit", "--config", "quick.yaml", "--run.if_exists", "resume", "--trainer.max_steps=3")
    assert "checkpoint" in error or "last.ckpt" in error
    for one in ("results.json", "checkpoints/last.ckpt"):
        assert (run / one).read_bytes() == before[run / one]


def test_an_unfinished_run_is_left_out_of_a_comparison(run, work, capsys):
    assert main(["fit", "--config", "quick.yaml", "--run.name", "second"]) == 0
    (work / "runs" / "begun").mkdir()
    (work / "runs" / "a file").write_text("x")
    (work / "runs" / "damaged").mkdir()
    (work / "runs" / "damaged" / "results.json").write_text("{")
    runs = sorted(str(path) for path in (work / "runs").iterdir())
    capsys.readouterr()
    assert main(["report", *runs, "--output", "all.html", "--no-tsne"]) == 0
    told = capsys.readouterr().out
    assert told.count("left out") == 3 and "begun" in told and (work / "all.html").is_file()
    assert main(["choose", *runs]) == 0
    assert "best by" in capsys.readouterr().out
    for command in (["report", *runs[:3], "--output", "none.html"], ["choose", *runs[:3]]):
        refusal(capsys, *command)
    assert not (work / "none.html").exists()


def test_a_container_user_without_a_home(work, monkeypatch, capsys):
    def nobody(*_):
        raise KeyError("getpwuid(): uid not found: 4242")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert main(["doctor"]) == 0
    assert main(["merge", "quick.yaml"]) == 0
    assert "~/x" in refusal(capsys, "merge", "~/x", "--force")


@pytest.mark.parametrize("recipe", ["[/red]", "[bold]x", "\x1b[31mred", "%s {0}"])
def test_names_are_shown_letter_by_letter(work, capsys, recipe):
    assert main(["fit", "--config", "quick.yaml", "--model.recipe", recipe, "--run.name", "r"]) == 0
    told = capsys.readouterr().out
    assert am.errors.printable(recipe) in told and "\x1b]" not in told and "\x1b[31m" not in told


def test_a_package_that_is_opened_is_imported_so_that_its_reader_registers(work, monkeypatch, capsys):
    (work / "my_forms.py").write_text(
        "from adaptive_merge.weights import Reader\n\n\nclass Mine(Reader):\n    expects = 'a .mine file'\n\n"
        "    def accepts(self, path):\n        return path.suffix == '.mine'\n\n    def read(self, path, base=None):\n"
        "        raise NotImplementedError\n"
    )
    monkeypatch.syspath_prepend(str(work))
    before = list(Reader.kinds)
    try:
        assert main(["--allow-import", "my_forms", "merge", "quick.yaml"]) == 0
        assert Reader.kinds[0].__name__ == "Mine"
    finally:
        Reader.kinds[:] = before
        sys.modules.pop("my_forms", None)
    (work / "broken_forms.py").write_text("import nothing_of_this_name\n")
    for name in ("no_such_package", "broken_forms"):
        assert name in refusal(capsys, "--allow-import", name, "merge", "quick.yaml")


def test_several_processes_say_nothing_of_sync_dist(work, suite_folder):
    command = [sys.executable, "-m", "adaptive_merge", "fit", "--config", "quick.yaml", "--trainer.devices", "2"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "sync_dist" not in done.stderr + done.stdout and "Warn" not in done.stderr


def test_data_check_looks_for_checkpoints(work, capsys):
    folder = work / "clip"
    (folder / "images" / "cat").mkdir(parents=True)
    from PIL import Image

    Image.new("RGB", (8, 8)).save(folder / "images" / "cat" / "a.png")
    suite = {"kind": "clip", "architecture": "ViT-B-32-quickgelu", "pretrained": "zero.pt", "experts": "{task}.pt"}
    (folder / "suite.json").write_text(json.dumps(suite | {"tasks": ["pets"], "folders": {"pets": "images"}}))
    main(["data", "check", "clip"])
    assert "the expert of task 'pets'" in " ".join(capsys.readouterr().out.split())
    (folder / "pets.pt").touch()
    main(["data", "check", "clip"])
    assert "zero.pt" in capsys.readouterr().out
    (folder / "zero.pt").touch()
    assert main(["data", "check", "clip"]) == 2  # both are there, and empty
    assert "zero.pt" in capsys.readouterr().out
