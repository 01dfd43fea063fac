"""Killed or told to stop at any moment: the newest checkpoint is whole, and is of the end of a step."""

import os
import random
import signal
import time
from itertools import count

import pytest
import torch
from fitting import Trajectory
from processes import guarded, parts, start, wait

import adaptive_merge as am
from adaptive_merge.callbacks.safe.preemption import Preempted
from adaptive_merge.runs.checkpoint_io import AtomicCheckpointIO, StorageError, check_writable

STEPS = 12


def save_without_end(path):
    io, filling = AtomicCheckpointIO(), torch.zeros(400_000)
    for step in count():
        io.save_checkpoint({"step": step, "filling": filling + step}, path)


def kill_during_saves(folder, times, seed=0):
    """Kill a process that does nothing but save, `times`; numbers of unreadable checkpoints, orphans, partial files."""
    path, draw = folder / "last.ckpt", random.Random(seed)
    elsewhere = {"TMPDIR": "/dev/shm"} if os.path.isdir("/dev/shm") else {}
    unreadable = partial = 0
    for _ in range(times):
        before = path.stat().st_mtime_ns if path.exists() else None
        process = start(save_without_end, path, log=folder / "log", environment=elsewhere)
        while not path.exists() or path.stat().st_mtime_ns == before:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.04))
        os.kill(process, signal.SIGKILL)
        assert wait(process, 10) == -signal.SIGKILL
        partial += len(list(folder.glob(".*")))
        try:
            content = AtomicCheckpointIO().load_checkpoint(path)  # as the next start does
            unreadable += not bool((content["filling"] == content["step"]).all())
        except am.InputError:
            unreadable += 1
    return unreadable, len(list(folder.glob(".*"))), partial


def test_kills_during_saves_leave_a_whole_checkpoint_and_no_orphans(tmp_path):
    unreadable, orphans, partial = kill_during_saves(tmp_path, 30)
    assert (unreadable, orphans) == (0, 0)
    assert partial > 0, "no kill hit a save: the test proves nothing"


@pytest.mark.soak
def test_two_hundred_kills(tmp_path, record_property):
    unreadable, orphans, partial = kill_during_saves(tmp_path, 200, seed=1)
    record_property("saves that were hit", partial)
    assert (unreadable, orphans) == (0, 0)


def module():
    bank, toy, heads, _ = parts()
    return am.TintingPP(bank, toy, heads)


def stream():
    return am.TaskStream(parts()[3], 8)


def signalled(folder, step, number, monkeypatch):
    """Send ourselves a signal within the backward pass of a step; the exit code and what was saved."""
    learner = module()
    backward = am.AdaptiveMerge.backward

    def interrupted(self, loss, *arguments, **options):
        if self.global_step == step:
            loss.register_hook(lambda _: [os.kill(os.getpid(), number) for _ in range(2)] and None)
        backward(self, loss, *arguments, **options)

    monkeypatch.setattr(am.AdaptiveMerge, "backward", interrupted)
    with pytest.raises(Preempted) as ended:
        guarded(folder, max_steps=STEPS + 1).fit(learner, datamodule=stream())
    monkeypatch.undo()
    return ended.value.code, torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def signals_inside_backward(folder, times, monkeypatch):
    trajectory, draw = Trajectory(), random.Random(0)
    guarded(folder, callbacks=[trajectory], max_steps=STEPS).fit(module(), datamodule=stream())
    for _ in range(times):
        step, number = draw.randrange(STEPS), draw.choice([signal.SIGTERM, signal.SIGUSR1])
        code, saved = signalled(folder, step, number, monkeypatch)
        assert (code, saved["global_step"]) == (143, step + 1)
        values = saved["state_dict"]["model.backbone.coefficients.values"]
        assert torch.equal(values, trajectory.values[step])
        assert saved["optimizer_states"][0]["state"][0]["step"] == step + 1


def test_a_signal_inside_backward_saves_the_end_of_the_step(tmp_path, monkeypatch):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        signals_inside_backward(tmp_path, 10, monkeypatch)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.soak
def test_a_hundred_signals_inside_backward(tmp_path, monkeypatch):
    signals_inside_backward(tmp_path, 100, monkeypatch)


def fill(path, limit):
    import resource

    io = AtomicCheckpointIO()
    io.save_checkpoint({"step": 1}, path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        io.save_checkpoint({"step": 2, "filling": torch.zeros(100_000)}, path)
    except StorageError as error:
        told = str(error)
        return 0 if "File too large" in told and str(path) in told else 3
    return 4


def test_a_full_disk_is_named_and_leaves_the_previous_checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    assert wait(start(fill, path, 65536, log=tmp_path / "log"), 20) == 0
    assert AtomicCheckpointIO().load_checkpoint(path) == {"step": 1}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.ckpt", "log"]


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    tmp_path.chmod(0o500)
    folder = tmp_path / "runs" if os.geteuid() else "/proc/runs"
    with pytest.raises(StorageError, match="cannot be written to"):
        check_writable(folder)
    tmp_path.chmod(0o700)
    check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_addresses_and_foreign_content_are_refused(tmp_path):
    io = AtomicCheckpointIO()
    with pytest.raises(am.InputError, match="not URLs"):
        io.load_checkpoint("https://example.org/last.ckpt")
    with pytest.raises(am.MissingFileError):
        io.load_checkpoint(tmp_path / "gone.ckpt", weights_only=False)
    with pytest.raises(am.InputError, match="plain values"):
        io.save_checkpoint({"module": torch.nn.Linear(1, 1)}, tmp_path / "last.ckpt")
    assert list(tmp_path.iterdir()) == []
