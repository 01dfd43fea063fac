"""A dashboard that fails on the first of two processes costs one warning: not the run, and not a bit of it."""

import logging
import os
import socket
import time

import pytest
import torch
from processes import guarded, launch, parts, start, texts, wait
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.loggers.logger import rank_zero_experiment
from pytorch_lightning.utilities import rank_zero_only

import adaptive_merge as am
from adaptive_merge.__main__ import main
from adaptive_merge.callbacks import protect

STEPS = 6
WARNING = "failed and is left out from here on"
SETTINGS = {"val_check_interval": 2, "check_val_every_n_epoch": None, "log_every_n_steps": 1}


class Breaking(WandbLogger):
    """Loses its server at a chosen place; like the logger that it is, it talks to it from the first process only."""

    where = ""

    def _maybe(self, place):
        if self.where == place:
            raise ConnectionError("the server is gone")

    @property
    @rank_zero_experiment
    def experiment(self):
        self._maybe("experiment")
        return super().experiment

    @rank_zero_only
    def log_metrics(self, metrics, step=None):
        # Late enough for the first steps to have been logged.
        self._maybe("log_metrics" if step and step > 2 else "")
        super().log_metrics(metrics, step)

    @rank_zero_only
    def finalize(self, status):
        self._maybe("finalize")
        super().finalize(status)


def unreachable():
    """Environment variables of a server at a port that was free a moment ago: nobody listens there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    return {"WANDB_MODE": "online", "WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "4"}


def wandb_logger(folder, where):
    """A logger that fails at `where`; None for a run without one."""
    if where == "nowhere":
        return False
    os.environ["WANDB_MODE"] = "offline"
    if where == "server":
        os.environ.update(unreachable())
    logger = Breaking(project="merging")
    logger.where = where
    return protect(logger, folder)


def member(rank, folder, where):
    logging.basicConfig(level=logging.WARNING, force=True)
    bank, toy, heads, images = parts()
    learner = am.TintingPP(bank, toy, heads)
    # Both processes get the logger, as they do from the command line; only the first one may write.
    trainer = guarded(folder, 2, max_steps=STEPS, **SETTINGS | {"logger": wandb_logger(folder, where)})
    trainer.fit(learner, datamodule=am.TaskStream(images, 8))
    torch.save({"state": learner.state_dict(), "step": trainer.global_step}, folder / f"{rank}.pt")


def run(folder, where):
    began = time.monotonic()
    log = folder / "log"
    assert launch(2, member, folder, where, folder=log) == [0, 0], texts(log)
    saved = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert [content["step"] for content in saved] == [STEPS, STEPS]
    return saved, texts(log), time.monotonic() - began


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    saved, told, _ = run(tmp_path_factory.mktemp("without"), "nowhere")
    assert WARNING not in told
    return saved


@pytest.mark.parametrize("where", ["experiment", "log_metrics", "finalize", "server"])
def test_a_dead_wandb_on_one_of_two_processes_costs_one_warning_and_no_bit(without, tmp_path, where, record_property):
    saved, told, seconds = run(tmp_path, where)
    record_property("seconds", seconds)
    assert told.count(WARNING) == 1, told
    for ours, theirs in zip(saved, without):
        assert ours["state"].keys() == theirs["state"].keys()
        assert all(torch.equal(value, theirs["state"][key]) for key, value in ours["state"].items())


def fit(arguments):
    logging.basicConfig(level=logging.WARNING, force=True)
    return main(["fit", *arguments])


def test_the_command_line_finishes_without_its_server(tmp_path, monkeypatch, suite_folder):
    monkeypatch.chdir(tmp_path)
    arguments = [
        f"--suite.name={suite_folder}",
        "--model.recipe=quick",
        "--model.coefficients=LayerWise",
        "--trainer.max_steps=2",
        "--trainer.accelerator=cpu",
        "--trainer.logger=WandbLogger",
    ]
    process = start(fit, arguments, log=tmp_path / "run.log", environment=unreachable())
    assert wait(process, 90) == 0, texts(tmp_path)
    assert texts(tmp_path).count(WARNING) == 1
    assert (tmp_path / "runs" / "quick" / "results.json").is_file()
