"""Exactly one process holds a lock; the others say whose it is; a lock whose process is gone stops nobody."""

import errno
import json
import os
import resource
import signal
import sys
import time

import pytest
from processes import start, texts, wait

from adaptive_merge.errors import StorageError
from adaptive_merge.process import locks
from adaptive_merge.process.locks import LockedError, holder, in_turn, locked


def hold(folder, gate):
    """Try once, all at the same moment; 0 for the one that holds it, 2 for those that are refused."""
    while not gate.exists():
        time.sleep(0.001)
    try:
        with locked(folder / ".lock", "the folder"):
            (folder / f"held-{os.getpid()}").touch()
            while not (folder / "over").exists():
                time.sleep(0.005)
    except LockedError as error:
        sys.stdout.write(f"{error}\n")
        return 2
    return 0


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("count", [2, 8])
def test_of_several_at_once_one_holds_the_lock_and_the_others_say_whose_it_is(
    tmp_path, monkeypatch, count, links, stale
):
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    if stale:
        (tmp_path / ".lock.4").write_text(json.dumps(locks._ourselves() | {"process": 2**22 + 1}))
    gate = tmp_path / "gate"
    running = [start(hold, tmp_path, gate, log=tmp_path / f"{number}.log") for number in range(count)]
    time.sleep(0.1)
    gate.touch()
    ended = [wait(process, 60) for process in running if not held_by(tmp_path, process, count)]
    (tmp_path / "over").touch()
    (winner,) = tmp_path.glob("held-*")
    assert ended == [2] * (count - 1)
    assert texts(tmp_path).count(f"in use by process {winner.name[5:]} on") == count - 1
    assert wait(int(winner.name[5:]), 60) == 0
    assert list(tmp_path.glob(".lock*")) == []


def held_by(folder, process, count):
    """Whether this process is the one that has the lock; waits until one has it."""
    while not list(folder.glob("held-*")):
        time.sleep(0.005)
    return (folder / f"held-{process}").exists()


def refuse(*_, **__):
    raise OSError(errno.EPERM, "no links here")


def test_a_killed_holder_is_followed_by_the_next(tmp_path):
    gate = tmp_path / "gate"
    gate.touch()
    for _ in range(3):
        process = start(hold, tmp_path, gate, log=tmp_path / "log")
        while not (tmp_path / f"held-{process}").exists():
            time.sleep(0.005)
        assert holder(tmp_path / ".lock")["process"] == process
        os.kill(process, signal.SIGKILL)
        assert wait(process, 20) == -signal.SIGKILL
        assert holder(tmp_path / ".lock") is None
    with locked(tmp_path / ".lock", "the folder"):
        pass
    assert list(tmp_path.glob(".lock*")) == []


@pytest.mark.parametrize(
    ("changes", "free"),
    [
        ({}, False),
        ({"process": 2**22 + 1}, True),
        ({"started": "1"}, True),  # the number belongs to another process by now
        ({"boot": "before"}, True),
        ({"host": "elsewhere"}, False),
        ({"space": "pid:[1]", "process": 2**22 + 1}, False),  # another container: not to be seen from here
        ({"process": "x"}, True),
    ],
)
def test_whose_lock_is_taken_over(tmp_path, changes, free):
    path = tmp_path / ".lock.1"
    path.write_text(json.dumps(locks._ourselves() | changes))
    if free:
        with locked(tmp_path / ".lock", "the folder"):
            assert [file.name for file in tmp_path.glob(".lock*")] == [".lock.2"]
        return
    with pytest.raises(LockedError) as error, locked(tmp_path / ".lock", "the folder"):
        pass
    far = bool({"host", "space"} & changes.keys())
    assert (f"remove `{path}`" in str(error.value)) == far
    assert path.exists()


def test_the_same_slurm_job_started_again_takes_over_from_any_host(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    (tmp_path / ".lock.1").write_text(json.dumps(locks._ourselves() | {"host": "elsewhere"}))
    with pytest.raises(LockedError), locked(tmp_path / ".lock", "the folder"):
        pass
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with locked(tmp_path / ".lock", "the folder"):
        pass


def test_a_named_job_takes_over_from_its_last_attempt_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv(locks.JOB, "adamerging")
    ours = locks._ourselves()
    (tmp_path / ".lock.1").write_text(json.dumps(ours))
    with pytest.raises(LockedError, match="wait until"), locked(tmp_path / ".lock", "the folder"):
        pass  # the same attempt, which is alive
    elsewhere = ours | {"host": "elsewhere", "restart": "elsewhere pid:[1]"}
    (tmp_path / ".lock.1").write_text(json.dumps(elsewhere | {"job": "another"}))
    with pytest.raises(LockedError), locked(tmp_path / ".lock", "the folder"):
        pass
    (tmp_path / ".lock.1").write_text(json.dumps(elsewhere))
    with pytest.raises(LockedError), locked(tmp_path / ".lock", "a cache", wait=True):
        pass  # what nodes of one attempt share is not taken from the other node
    with locked(tmp_path / ".lock", "the folder"):
        pass


@pytest.mark.parametrize(
    ("squeue", "free"),
    [
        ("echo RUNNING", False),
        ("exit 0", True),  # it has left the queue a moment ago
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", True),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", False),
    ],
)
def test_a_lock_of_a_job_that_slurm_has_ended_stops_nobody(tmp_path, monkeypatch, squeue, free):
    (tmp_path / "squeue").write_text(f'#!/bin/sh\n[ "$2" = --jobs=4711 ] || exit 3\n{squeue}\n')
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / ".lock.1").write_text(json.dumps(locks._ourselves() | {"host": "elsewhere", "job": "4711"}))
    assert (holder(tmp_path / ".lock") is None) == free
    theirs = {"host": "elsewhere", "job": "4711", "cluster": "another"}
    (tmp_path / ".lock.1").write_text(json.dumps(locks._ourselves() | theirs))
    assert holder(tmp_path / ".lock"), "this SLURM does not know another's jobs"
    (tmp_path / ".lock.1").write_text(json.dumps(locks._ourselves() | {"host": "elsewhere"}))
    assert holder(tmp_path / ".lock"), "of what was no job SLURM cannot know"


def take_on_a_full_disk(path, lock):
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    with pytest.raises(StorageError, match="cannot be written to"), lock(path, "the folder"):
        pass
    return len(list(path.parent.glob(".lock*")))


def test_a_full_disk_leaves_no_part_of_a_lock(tmp_path):
    assert wait(start(take_on_a_full_disk, tmp_path / ".lock", locked, log="/dev/null"), 20) == 0


def unsupported(*_):
    raise OSError(errno.ENOLCK, "no locks available")


def test_what_has_no_turn_elsewhere_says_what_to_choose(tmp_path, monkeypatch):
    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    (tmp_path / ".lock.1").write_text(json.dumps(locks._ourselves() | {"host": "elsewhere"}))
    with pytest.raises(StorageError), in_turn(tmp_path / ".lock", "the cache"):
        pass
    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    with pytest.raises(LockedError, match="remove .* else choose another folder"), in_turn(tmp_path / ".lock", "it"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".lock.1"]


def test_a_damaged_lock_is_nobodys(tmp_path):
    (tmp_path / ".lock.1").write_text('{"host": ')
    with locked(tmp_path / ".lock", "the folder"):
        assert holder(tmp_path / ".lock")["process"] == os.getpid()
