"""Many processes in tests without many imports: the test's own process is forked, for torch takes seconds to load."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from conftest import TASKS, Toy, perturbed
from pytorch_lightning.strategies import DDPStrategy

import adaptive_merge as am
from adaptive_merge.callbacks.safe.safeguards import safeguards
from adaptive_merge.runs.checkpoint_io import AtomicCheckpointIO

QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "accelerator": "cpu",
    "use_distributed_sampler": False,
}


def start(function, *arguments, log, environment=None):
    """Run `function` in a fork, as a process of its own session would; returns its id."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.setsid()
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, closefd=False)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        os.environ.update(environment or {})
        code = function(*arguments) or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(process, seconds):
    """The exit code of a started process, negative for a signal; it is killed, and the test fails, after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    raise AssertionError(f"still running after {seconds} s")


def launch(world, function, *arguments, folder: Path, seconds=100):
    """Run `function(rank, *arguments)` on `world` processes as torchrun would, and give their exit codes."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(world):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "test",
        }
        log = folder / f"{rank}.log"
        processes.append(start(_member, rank, function, arguments, log=log, environment=environment))
    return [wait(process, seconds) for process in processes]


def _member(rank, function, arguments):
    code = function(rank, *arguments)
    if dist.is_initialized():
        dist.barrier()  # the first process holds the store of all
    return code


def crowding():
    """How much slower than alone: processes that want to run for each processor, at least 1; for limits on hangs."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def texts(folder):
    return "\n".join(path.read_text() for path in sorted(Path(folder).glob("*.log")))


def parts(size=None):
    """The toy of the fixtures, made anew: bank, backbone, heads and images."""
    torch.manual_seed(0)
    toy = Toy()
    experts = {task: perturbed(toy.state_dict(), seed) for seed, task in enumerate(TASKS)}
    generator = torch.Generator().manual_seed(7)
    heads = {
        task: 16 * torch.nn.functional.normalize(torch.randn(classes, 6, generator=generator), dim=-1)
        for task, classes in TASKS.items()
    }
    images = {}
    for task, classes in TASKS.items():
        count = (size or {}).get(task, 20 + 3 * classes)
        pixels = torch.randint(0, 256, (count, 4, 4, 3), generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, classes, (count,), generator=generator)
        images[task] = am.Images(pixels, labels, [f"{task} {c}" for c in range(classes)])
    return am.TaskVectors.from_state_dicts(toy.state_dict(), experts), toy, heads, images


def guarded(folder, world=1, callbacks=(), timeout=60, **settings):
    """A quiet trainer with every safeguard, whose checkpoints go to `folder`."""
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=timeout)) if world > 1 else "auto"
    trainer = pl.Trainer(
        devices=world,
        strategy=strategy,
        callbacks=[*safeguards(folder, callbacks), *callbacks],
        **QUIET | settings,
    )
    trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    return trainer
