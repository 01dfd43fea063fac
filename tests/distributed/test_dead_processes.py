"""A process that raises, is killed or hangs ends the job, under torchrun's own agent."""

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from processes import QUIET, guarded, launch, parts, start, texts, wait
from pytorch_lightning.strategies import DDPStrategy
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import adaptive_merge as am
from adaptive_merge.callbacks.safe.preemption import Preemption
from adaptive_merge.callbacks.safe.rng import RngState


class Accident(pl.Callback):
    """Something happens to the last process at step 5."""

    def __init__(self, kind):
        self.kind = kind

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_rank != trainer.world_size - 1 or trainer.global_step != 5:
            return
        if self.kind == "raises":
            raise RuntimeError("planted")
        if self.kind == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)


def member(kind, folder):
    bank, toy, heads, images = parts()
    callbacks = [Preemption(Path(folder) / "last.ckpt", grace=5), Accident(kind)]
    trainer = guarded(folder, 2, callbacks, timeout=10, max_steps=100)
    trainer.fit(am.AdaMerging(bank, toy, heads), datamodule=am.TaskStream(images, 8))


def agent(kind, folder):
    """What `torchrun --nproc_per_node 2` does, with forks in place of new interpreters."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="fork",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, member)(kind, str(folder))
    except ChildFailedError:
        return 1


def session_of(leader):
    """Ids of the processes of a session that are not zombies."""
    alive = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(session) == leader and state != "Z":
            alive.append(int(path.parent.name))
    return alive


def test_the_job_ends_with_an_error_and_leaves_nobody(tmp_path):
    kinds = ("raises", "is killed", "hangs")
    agents = {kind: start(agent, kind, tmp_path / kind, log=tmp_path / f"{kind}.log") for kind in kinds}
    for kind, process in agents.items():
        # Without the strategy's timeout of 10 s they would wait for 5 minutes; a busy machine takes its time.
        assert wait(process, 240) == 1, texts(tmp_path)
        assert session_of(process) == [], kind


class Patience(pl.Callback):
    """Keep how many seconds the processes' groups wait: the strategy's own, and that of our flags."""

    def on_train_batch_end(self, trainer, *_):
        state = next(callback for callback in trainer.callbacks if isinstance(callback, RngState))
        groups = (dist.distributed_c10d._get_default_group(), state._ranks._group)
        self.seconds = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


def patient(rank, folder, given):
    bank, toy, heads, images = parts()
    patience = Patience()
    strategy = "ddp" if given is None else DDPStrategy(timeout=timedelta(seconds=given))
    trainer = pl.Trainer(devices=2, strategy=strategy, max_steps=1, callbacks=[RngState(), patience], **QUIET)
    trainer.fit(am.AdaMerging(bank, toy, heads), datamodule=am.TaskStream(images, 8))
    (folder / f"{rank}.txt").write_text(str(patience.seconds))


@pytest.mark.parametrize("given", [None, 60, 1800, 3600])
def test_processes_wait_five_minutes_for_one_another_unless_told_otherwise(tmp_path, given):
    assert launch(2, patient, tmp_path, given, folder=tmp_path) == [0, 0], texts(tmp_path)
    for rank in range(2):
        assert (tmp_path / f"{rank}.txt").read_text() == str([float(given or 300)] * 2)
