import json
import logging
import os
import sys
import time
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from sample_runs import HOSTILE

import adaptive_merge as am
from adaptive_merge.callbacks import Dashboard, Guard, History, Sturdy, protect
from adaptive_merge.callbacks.show.dashboard import _markdown
from adaptive_merge.runs.array import save_array

SECRET = "0123456789abcdef0123456789abcdef01234567"
QUIET = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "max_epochs": -1,
    "num_sanity_val_steps": 0,
    "check_val_every_n_epoch": None,
    "log_every_n_steps": 1,
}


class Dead(Logger):
    """A dashboard that raises at a chosen place."""

    def __init__(self, where):
        super().__init__()
        self.where, self.calls = where, 0

    def _maybe(self, place):
        self.calls += 1
        if self.where == place:
            raise ConnectionError("the server is gone")

    name, version = "dead", 0

    @property
    def experiment(self):
        self._maybe("experiment")
        return self

    def log_metrics(self, metrics, step=None):
        self._maybe("log_metrics")

    def log_hyperparams(self, params, *args, **kwargs):
        self._maybe("log_hyperparams")

    def log_image(self, *args, **kwargs):
        self._maybe("log_image")

    def finalize(self, status):
        self._maybe("finalize")


@pytest.fixture
def parts(bank, toy, heads, images):
    """A fresh module and its stream."""
    return lambda: (am.AdaMerging(bank, toy, heads), am.TaskStream(images, images_per_task=4))


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No key, no mode, no home with a netrc; and no run left open."""
    wandb = pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("WANDB_MODE", "WANDB_DATA_DIR"):
        # Set first, so that what the loggers put there goes again.
        monkeypatch.setenv(name, "unset")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    yield wandb
    wandb.finish()


def adapt(parts, loggers, folder, steps=4, callbacks=(), **options):
    module, stream = parts()
    csv = CSVLogger(folder, name="", version="")
    trainer = pl.Trainer(
        max_steps=steps,
        val_check_interval=2,
        logger=[csv, *loggers],
        callbacks=[History(str(folder)), Dashboard(every=1), *callbacks],
        default_root_dir=folder,
        **QUIET,
    )
    (folder / "config.yaml").write_text(f"model: {{lr: 0.001}}\nhub: {{hf_token: {SECRET}, user: me}}\n")
    trainer.fit(module, stream, **options)
    am.score(trainer, module, stream)
    return module


@pytest.mark.parametrize("where", ["experiment", "log_metrics", "log_hyperparams", "log_image", "finalize"])
def test_a_dead_logger_costs_one_warning_and_no_bit(parts, tmp_path, caplog, where):
    dead = Dead(where)
    with caplog.at_level(logging.WARNING, "adaptive_merge"):
        module = adapt(parts, [protect(dead, tmp_path)], tmp_path)
    told = [record for record in caplog.records if record.name.startswith("adaptive_merge")]
    assert len(told) == 1 and "Dead failed" in told[0].message and "the server is gone" in told[0].message
    plain, stream = parts()
    pl.Trainer(max_steps=4, logger=False, default_root_dir=tmp_path, **QUIET).fit(plain, stream)
    assert torch.equal(plain.coefficients(), module.coefficients())
    assert dead.calls < 60


def test_wandb_offline_holds_scalars_figures_and_table_and_no_secret(parts, tmp_path, offline, monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr("sys.argv", ["adaptive-merge", "fit", f"--token={SECRET}"])
    logger = protect(WandbLogger(project="merging"), tmp_path)
    with caplog.at_level(logging.WARNING, "adaptive_merge"):
        adapt(parts, [logger], tmp_path)
    told = [record.getMessage() for record in caplog.records if record.name.startswith("adaptive_merge")]
    assert len(told) == 1 and "wandb sync" in told[0]
    run = logger.inner.experiment
    assert run.name == tmp_path.name and not run.group and run.settings.mode == "offline"
    offline.finish()
    folder = next((tmp_path / "wandb").glob("offline-run-*"))
    until = time.monotonic() + 30
    # wandb's own process closes the file a moment after `finish` has returned.
    while b"results" not in next(folder.glob("*.wandb")).read_bytes() and time.monotonic() < until:
        time.sleep(0.1)
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = " ".join(path.name for path in files)
    assert "coefficients" in names and "accuracy" in names and "results" in names and ".wandb" in names
    assert not any(
        "diff" in path.name or path.suffix in (".patch", ".py") or path.name == "wandb-metadata.json" for path in files
    )
    content = {path: path.read_bytes() for path in files}
    assert not any(SECRET.encode() in text for text in content.values())
    record = next(text for path, text in content.items() if path.suffix == ".wandb")
    for key in (b"train/loss", b"train/entropy", b"adapted/accuracy", b"figures/coefficients", b"results", b"(hidden)"):
        assert key in record
    private = ("git_commit", "diff --git", os.getcwd(), sys.executable, str(Path.home() / ".local"))
    assert not any(word.encode() in record for word in private)
    table = json.loads(next(text for path, text in content.items() if path.name.startswith("results")))
    assert [row[0] for row in table["data"]] == ["red", "green", "blue"] and len(table["columns"]) == 5


def test_offline_attempts_are_one_run_of_their_array(tmp_path, offline):
    folder = tmp_path / "sweep" / "lr=1"
    folder.mkdir(parents=True)
    save_array(folder.parent, [("lr=1", "lr=1")])
    for resumed in (False, True):
        logger = protect(WandbLogger(project="merging"), folder, resumed)
        run = logger.experiment
        logger.log_metrics({"loss": 1.0}, 0)
        assert (run.name, run.group, run.settings.resume) == ("lr=1", "sweep", "allow")
        offline.finish()
        time.sleep(1.1)  # wandb names a folder by the second
    attempts = [path.name.rpartition("-")[2] for path in (folder / "wandb").glob("offline-run-*")]
    assert attempts == [json.loads((folder / "wandb.json").read_text())["id"]] * 2


@pytest.mark.parametrize("damaged", ["", "[]", "{}"])
def test_a_run_that_begins_anew_is_another_one(tmp_path, offline, damaged):
    ids = []
    for resumed in (False, False, True):
        inner = WandbLogger(project="merging")
        protect(inner, tmp_path, resumed)._prepare()
        ids.append(inner._wandb_init["id"])
        if len(ids) == 2:
            (tmp_path / "wandb.json").write_text(damaged)
    assert len(set(ids)) == 3


def test_what_wandb_is_told_by_variables_holds(tmp_path, offline, monkeypatch):
    for name in ("RUN_ID", "NAME", "RUN_GROUP"):
        monkeypatch.setenv(f"WANDB_{name}", f"my-{name}")
    inner = WandbLogger(project="merging")
    protect(inner, tmp_path)._prepare()
    assert [inner._wandb_init[key] for key in ("id", "name", "group")] == ["my-RUN_ID", "my-NAME", "my-RUN_GROUP"]


def test_online_runs_are_resumed_under_one_id(tmp_path, offline, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    options = []
    for resumed in (False, True):
        inner = WandbLogger(project="merging", settings=offline.Settings(disable_git=False))
        protect(inner, tmp_path, resumed)._prepare()
        options.append(inner._wandb_init)
    assert options[0]["id"] == options[1]["id"] and options[1]["resume"] == "allow" and "mode" not in options[0]
    settings = options[0]["settings"]
    assert settings.disable_git is False and settings.save_code is False and settings.x_disable_meta is True
    assert SECRET not in (tmp_path / "wandb.json").read_text()


def test_a_key_in_netrc_means_online(tmp_path, offline, monkeypatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".netrc").write_text(f"machine api.wandb.ai login user password {SECRET}\n")
    (tmp_path / "home" / ".netrc").chmod(0o600)
    inner = WandbLogger(project="merging")
    protect(inner, tmp_path)._prepare()
    assert "mode" not in inner._wandb_init and inner._wandb_init["resume"] == "allow"


def test_tensorboard_gets_figures_and_a_table(parts, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    adapt(parts, [protect(TensorBoardLogger(tmp_path, name="board", version=""), tmp_path)], tmp_path)
    events = EventAccumulator(str(tmp_path / "board")).Reload().Tags()
    assert {"figures/coefficients", "figures/accuracy", "figures/trajectories"} <= set(events["images"])
    assert {"train/loss", "adapted/accuracy"} <= set(events["scalars"])
    assert any("results" in tag for tag in events["tensors"])


def test_a_choice_by_labels_marks_every_name(parts, tmp_path):
    sent = []
    logger = Dead("nowhere")
    logger.log_image = lambda name, images, step: sent.append(name)
    logger.log_table = lambda name, **content: sent.append(name)
    adapt(parts, [Sturdy(logger)], tmp_path, callbacks=[Guard(every=1, images=4, select="oracle")])
    assert {"ORACLE/figures/accuracy", "ORACLE/figures/coefficients", "ORACLE/results"} <= set(sent)
    assert all(name.startswith("ORACLE/") for name in sent)


def test_unseen_tasks_are_called_so(bank, toy, heads, images, tmp_path):
    def parts():
        protocol = am.Unseen(["green"])
        return am.AdaMerging(bank, toy, heads, unseen=["green"]), am.TaskStream(images, 4, protocol=protocol)

    tables = []
    logger = Dead("nowhere")
    logger.log_table = lambda name, columns, data, step: tables.append(data)
    adapt(parts, [Sturdy(logger)], tmp_path)
    assert [row[0] for row in tables[-1]] == ["red", "unseen: green", "blue"]


def test_a_figure_that_fails_does_not_stop_training(parts, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("adaptive_merge.report.coefficient_figures.coefficient_heatmap", lambda *values: 1 / 0)
    with caplog.at_level(logging.WARNING, "adaptive_merge"):
        adapt(parts, [Sturdy(Dead("nowhere"))], tmp_path)
    assert caplog.text.count("could not be drawn") == 1


def test_hostile_names_stay_in_their_cell():
    text = _markdown(["task", "adapted"], [[name, 0.5] for name in HOSTILE])
    assert "<" not in text and len(text.splitlines()) == len(HOSTILE) + 2
    assert all(line.count("|") == 3 for line in text.splitlines())


def test_secrets_do_not_reach_hyperparameters():
    seen = []
    inner = Dead("nowhere")
    inner.log_hyperparams = seen.append
    Sturdy(inner).log_hyperparams({"lr": 1, "logger": {"api_key": SECRET, "url": f"ftp://me:{SECRET}@host"}})
    assert seen[0]["lr"] == 1 and SECRET not in str(seen)
