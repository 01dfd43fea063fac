"""The 20 data sets, written in their true formats: found, in the order of the published heads, or named errors."""

from __future__ import annotations

import importlib
import os

import pytest
import torch
from data.data_sets import NEEDS, WRITERS, save

import adaptive_merge as am
from adaptive_merge.data.cache import resized
from adaptive_merge.errors import AdaptiveMergeError
from adaptive_merge.suites.class_names import clip_task, clip_task_names
from adaptive_merge.suites.clip_tasks import TEST_SIZES, layout_of, open_clip_task, open_folder_task


@pytest.fixture(autouse=True)
def small_files_pass_for_whole_ones(monkeypatch):
    """torchvision knows some files by their md5; ours are of the same format but smaller."""
    for name in ("cifar", "stl10", "svhn", "flowers102", "fer2013"):
        module = importlib.import_module(f"torchvision.datasets.{name}")
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: os.path.isfile(path))


@pytest.mark.parametrize("name", clip_task_names())
def test_each_data_set_is_read_in_the_order_of_its_head(tmp_path, name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"{name} is stored in a format that needs it")
    labels = WRITERS[name](tmp_path)
    source = open_clip_task(name, tmp_path, sizes="any")
    assert source.labels.tolist() == labels and len(source) == len(labels)
    assert tuple(source.classes) == clip_task(name).classes
    assert resized(source.load(len(source) - 1), 16).shape == (16, 16, 3)
    again = open_clip_task(name, tmp_path, sizes="any")
    assert again.identity == source.identity
    with pytest.raises(am.InputError, match=f"found {len(labels)} test images, the published test split has"):
        open_clip_task(name, tmp_path)


@pytest.mark.parametrize("name", clip_task_names())
def test_what_is_not_there_is_named_with_its_layout(tmp_path, name):
    (tmp_path / "something else").mkdir()
    with pytest.raises(am.AdaptiveMergeError) as error:
        open_clip_task(name, tmp_path)
    told = str(error.value)
    assert name in told and layout_of(name) in told and str(tmp_path) in told
    assert "something else" in told or "no such" in told


def test_sizes_of_the_eight_tasks_add_up():
    assert sum(TEST_SIZES[name][0] for name in clip_task_names()[:8]) == 87_470
    assert set(TEST_SIZES) == set(clip_task_names())


def test_emnist_is_the_digits_split():
    assert "digits" in layout_of("EMNIST") and len(clip_task("EMNIST").classes) == 10


def test_any_image_folder_is_a_task(tmp_path):
    for index, name in enumerate(("robin", "jay", "owl")):
        save(tmp_path / "birds" / name / "1.png", index)
    (tmp_path / "names.txt").write_text("blue jay\ntawny owl\neuropean robin\n")
    assert open_folder_task("birds", tmp_path / "birds").classes == ["jay", "owl", "robin"]
    source = open_folder_task("birds", tmp_path / "birds", class_names=tmp_path / "names.txt")
    assert source.classes == ["blue jay", "tawny owl", "european robin"]
    assert torch.equal(source.labels, torch.arange(3))
    (tmp_path / "names.txt").write_text("jay\nowl\n")
    with pytest.raises(am.InputError, match="names 2 classes, .* has 3 class folders"):
        open_folder_task("birds", tmp_path / "birds", class_names=tmp_path / "names.txt")


def test_a_published_task_in_a_folder_of_ones_own_is_matched_by_name(tmp_path):
    for name in ("9", "0", "4"):
        save(tmp_path / name / "1.png")
    assert open_folder_task("MNIST", tmp_path, sizes="any").labels.tolist() == [0, 4, 9]
    save(tmp_path / "ten" / "1.png")
    with pytest.raises(am.InputError, match="`ten` is no class of MNIST"):
        open_folder_task("MNIST", tmp_path, sizes="any")


@pytest.mark.parametrize(
    ("content", "message"), [((), "expected one folder a class"), (("cat",), "cat`: expected images")]
)
def test_empty_folders_are_named(tmp_path, content, message):
    for name in content:
        (tmp_path / name).mkdir()
    with pytest.raises(am.InputError, match=message):
        open_folder_task("pets", tmp_path)


def test_an_unknown_data_set_gets_the_nearest_name(tmp_path):
    with pytest.raises(am.InputError, match="no data set 'Sun397'"):
        open_clip_task("Sun397", tmp_path)


@pytest.mark.parametrize("name", clip_task_names())
def test_a_file_that_is_cut_short_is_told_of(tmp_path, name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"{name} is stored in a format that needs it")
    WRITERS[name](tmp_path)
    refused = 0
    for path in (path for path in sorted(tmp_path.rglob("*")) if path.is_file()):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        try:
            source = open_clip_task(name, tmp_path, sizes="any")
            resized(source.load(len(source) - 1), 16)
        except AdaptiveMergeError:
            refused += 1
        path.write_bytes(content)
    assert refused or name == "FER2013"  # a shorter table is a table; its size is what tells
