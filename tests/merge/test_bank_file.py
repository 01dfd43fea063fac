"""A bank made once: by one process while the others wait, and by another one where the first dies."""

import errno
import os
import signal
import time

import pytest
import torch
from processes import start, wait

import adaptive_merge as am
from adaptive_merge.engine.transformed import transformed
from adaptive_merge.merge.bank_file import kept_bank, kept_file
from adaptive_merge.process import locks
from adaptive_merge.transforms import TSVM


class Slow:
    """Notes that it was asked, and takes its time."""

    def __init__(self, bank, folder, seconds=0.5):
        self.bank, self.log, self.seconds = bank, folder / "asked", seconds

    def __call__(self):
        with self.log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(self.seconds)
        return self.bank * 2

    @property
    def asked(self):
        return self.log.read_text().split() if self.log.is_file() else []


def read_by(path, make, result):
    torch.save(kept_file(path, make, "twice").vectors.clone(), result)


def refuse(*_):
    raise OSError(errno.ENOLCK, "no locks available")


@pytest.mark.parametrize("flock", [True, False])
def test_of_two_processes_one_makes_it_and_the_other_reads_it(bank, tmp_path, monkeypatch, flock):
    if not flock:  # NFS, Lustre
        monkeypatch.setattr(locks.fcntl, "flock", refuse)
    make = Slow(bank, tmp_path)
    results = [tmp_path / f"{number}.pt" for number in range(2)]
    path = tmp_path / "banks" / "made.safetensors"
    both = [start(read_by, path, make, result, log=tmp_path / "log") for result in results]
    assert [wait(process, 60) for process in both] == [0, 0]
    assert len(make.asked) == 1
    assert all(torch.equal(torch.load(result, weights_only=True), 2 * bank.vectors) for result in results)
    assert [file.name for file in path.parent.iterdir()] == ["made.safetensors"]


def test_where_the_process_that_makes_it_dies_another_one_does(bank, tmp_path):
    path = tmp_path / "banks" / "made.safetensors"
    forever, quick = Slow(bank, tmp_path, 600), Slow(bank, tmp_path, 0)
    first = start(read_by, path, forever, tmp_path / "0.pt", log=tmp_path / "log")
    while not forever.asked:
        time.sleep(0.01)
    # What it would have left behind, had it been writing.
    (path.parent / f".{path.name}.partial-{first}").write_bytes(b"half")
    second = start(read_by, path, quick, tmp_path / "1.pt", log=tmp_path / "log")
    time.sleep(0.2)
    assert len(quick.asked) == 1  # it waits
    os.killpg(first, signal.SIGKILL)
    os.waitpid(first, 0)
    assert wait(second, 60) == 0
    assert torch.equal(torch.load(tmp_path / "1.pt", weights_only=True), 2 * bank.vectors)
    assert [file.name for file in path.parent.iterdir()] == ["made.safetensors"]


def test_what_transforms_made_is_read_by_the_next_run(bank, tmp_path, monkeypatch):
    kept = kept_bank(bank, tmp_path)
    first = transformed(kept, [TSVM()])
    monkeypatch.setattr(TSVM, "__call__", lambda *_: pytest.fail("computed again"))
    again = transformed(kept_bank(bank, tmp_path), [TSVM()])
    assert torch.equal(again.vectors, first.vectors) and again.published == 1.0
    assert again.tasks == bank.tasks and again.fingerprints["pretrained"] == bank.fingerprints["pretrained"]


@pytest.mark.parametrize(
    "change",
    [
        lambda bank: (bank, [TSVM("split")]),
        lambda bank: (bank, [am.DARE(0.5), TSVM()]),
        lambda bank: (bank.select(["red", "blue"]), [TSVM()]),
        lambda bank: (kept_bank(bank * 2, bank.folder), [TSVM()]),
    ],
)
def test_other_settings_orders_tasks_and_experts_are_other_files(bank, tmp_path, change):
    transformed(kept_bank(bank, tmp_path), [TSVM()])
    other, transforms = change(kept_bank(bank, tmp_path))
    expected = other
    for transform in transforms:
        expected = transform(expected)
    before = set(tmp_path.glob("transformed-*"))
    assert torch.equal(transformed(other, transforms).vectors, expected.vectors)
    assert len(set(tmp_path.glob("transformed-*")) - before) == 1


def test_nested_settings_count(bank, tmp_path):
    kept = kept_bank(bank, tmp_path)
    for density in (0.2, 0.3):
        deep = am.Consensus(am.LiNeS(0.5, 0.1, am.Consensus(am.LiNeS(0.5, 0.1, am.Ties(density)))))
        assert torch.equal(transformed(kept, [deep]).vectors, deep(bank).vectors)


def test_a_users_transform_is_computed_each_time_and_a_bank_without_a_folder_leaves_no_file(bank, tmp_path):
    class Mine(am.Transform):
        def __call__(self, bank):
            return bank * 3

    transformed(kept_bank(bank, tmp_path), [Mine()])
    transformed(kept_bank(bank, tmp_path), [am.Consensus(Mine())])
    transformed(bank, [TSVM()])
    assert not list(tmp_path.glob("transformed-*"))


def test_a_damaged_file_and_one_of_something_else_are_refused(bank, tmp_path):
    kept = kept_bank(bank, tmp_path)
    transformed(kept, [TSVM()])
    (path,) = tmp_path.glob("transformed-*")
    content = path.read_bytes()
    path.write_bytes(content[:-4] + b"\0\0\1\0")
    with pytest.raises(am.InputError, match="damaged.*remove it, and the next run writes it anew"):
        transformed(kept, [TSVM()])
    path.unlink()
    transformed(kept, [TSVM("split")])
    (other,) = tmp_path.glob("transformed-*")
    other.rename(path)
    with pytest.raises(am.InputError, match="another bank than its name says; remove it"):
        transformed(kept, [TSVM()])
