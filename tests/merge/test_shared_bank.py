"""A bank folder: experts are read by one process of a node, and read again where they have changed."""

import hashlib
import json
import os
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from processes import start, wait
from safetensors.torch import load_file, save_file

import adaptive_merge as am
from adaptive_merge import files
from adaptive_merge.errors import StorageError
from adaptive_merge.suites import shared_bank as shared
from adaptive_merge.suites.shared_bank import shared_bank


def age(folder, seconds=60):
    """As if all files had been written some time ago."""
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (time.time() - seconds,) * 2)
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def experts_folder(suite_folder, tmp_path):
    return age(shutil.copytree(suite_folder, tmp_path / "suite"))


@pytest.fixture
def reads(monkeypatch):
    """How often experts have been made a bank."""
    made, original = [], am.TaskVectors.from_state_dicts.__func__

    def counted(cls, *arguments, **settings):
        made.append(1)
        return original(cls, *arguments, **settings)

    monkeypatch.setattr(am.TaskVectors, "from_state_dicts", classmethod(counted))
    return made


def test_a_second_process_reads_the_bank_and_no_expert(experts_folder, reads, tmp_path):
    plain, first, second = (am.load_suite(str(experts_folder), banks=banks) for banks in (None, *["banks"] * 2))
    assert len(reads) == 2
    for found in (first, second):
        assert torch.equal(found.task_vectors.vectors, plain.task_vectors.vectors)
        assert found.task_vectors.fingerprint == plain.task_vectors.fingerprint
        assert found.task_vectors.folder is not None
    assert len(list((tmp_path / "banks").glob("bank-*"))) == 1


def other_expert(folder):
    """Another expert in the same number of bytes, of another time."""
    path = folder / "experts" / "red.safetensors"
    size = path.stat().st_size
    save_file({name: 1.01 * value for name, value in load_file(path).items()}, path)
    assert path.stat().st_size == size
    manifest = json.loads((folder / "suite.json").read_text())
    manifest["files"]["experts/red.safetensors"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "suite.json").write_text(json.dumps(manifest))
    age(folder, 30)


def empty(pattern):
    """Files of the bank folder without their content."""
    for path in Path("banks").glob(pattern):
        path.write_text("")


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        (other_expert, {}),
        (lambda _: None, {"tasks": ["blue", "red"]}),
        (lambda _: None, {"dtype": "bfloat16"}),
        (lambda _: shutil.rmtree("banks"), {}),
        (lambda _: [path.unlink() for path in Path("banks").glob("bank-*")], {}),
        (lambda _: empty("sources-*"), {}),
    ],
    ids=["an expert", "tasks", "dtype", "no folder", "no bank", "a damaged note"],
)
def test_what_has_changed_is_read_again(experts_folder, reads, change, settings):
    am.load_suite(str(experts_folder), banks="banks")
    change(experts_folder)
    found = am.load_suite(str(experts_folder), banks="banks", **settings)
    assert len(reads) == 2
    expected = am.load_suite(str(experts_folder), **settings).task_vectors
    assert torch.equal(found.task_vectors.vectors, expected.vectors) and found.task_vectors.tasks == expected.tasks


def test_a_damaged_bank_is_told_of(experts_folder):
    am.load_suite(str(experts_folder), banks="banks")
    empty("bank-*")
    with pytest.raises(am.InputError, match="remove it, and the next run writes it anew"):
        am.load_suite(str(experts_folder), banks="banks")


@pytest.mark.parametrize("kind", ["young", "of a hub", "changed meanwhile"])
def test_what_files_do_not_tell_is_built_each_time(bank, tmp_path, kind):
    source = tmp_path / "expert.pt"
    source.write_bytes(b"1")
    age(tmp_path) if kind != "young" else None

    def build():
        if kind == "changed meanwhile":
            source.write_bytes(b"2")
        return bank, {"expert.pt": ("a note",)}

    found, notes = shared_bank("banks", ["hf-hub:a/b" if kind == "of a hub" else str(source)], [], build)
    assert found.fingerprint == bank.fingerprint and notes == {"expert.pt": ("a note",)}
    assert [path.name for path in (tmp_path / "banks").iterdir()] == [f"bank-{bank.fingerprint}.safetensors"]


def test_where_nothing_can_be_written_a_bank_that_is_there_is_read(experts_folder, reads, monkeypatch):
    kept = am.load_suite(str(experts_folder), banks="banks").task_vectors
    for path in Path("banks").glob("sources-*"):
        path.unlink()

    @contextmanager
    def refused(*_):
        raise StorageError("read-only")
        yield

    monkeypatch.setattr(files, "replacing", refused)
    monkeypatch.setattr(shared, "in_turn", refused)
    found = am.load_suite(str(experts_folder), banks="banks").task_vectors
    assert found.fingerprint == kept.fingerprint and len(reads) == 2


def read_by(folder, source, bank, log, result):
    def build():
        with open(log, "a") as file:
            file.write("built\n")
        time.sleep(0.5)
        return bank, {"red": ["a note"]}

    found, notes = shared_bank(folder, [str(source)], ["red"], build)
    torch.save([found.vectors.clone(), notes["red"] == ["a note"]], result)


def test_of_processes_that_start_together_one_builds(bank, tmp_path):
    source = tmp_path / "experts"
    source.mkdir()
    (source / "red.pt").write_bytes(b"1")
    age(source)
    results = [tmp_path / f"{number}.pt" for number in range(3)]
    started = [
        start(read_by, tmp_path / "banks", source, bank, tmp_path / "built", result, log=tmp_path / "log")
        for result in results
    ]
    assert [wait(process, 60) for process in started] == [0] * 3, (tmp_path / "log").read_text()
    assert (tmp_path / "built").read_text().split() == ["built"]
    for result in results:
        vectors, noted = torch.load(result, weights_only=True)
        assert noted and torch.equal(vectors, bank.vectors)
    assert not list((tmp_path / "banks").glob(".*"))
