"""Corrupted images: severities, draws that belong to the image, and the interface of the images they wrap."""

from __future__ import annotations

import pickle
from typing import get_args

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from torch.utils.data import DataLoader, Dataset

import adaptive_merge as am
from adaptive_merge.data import corruptions
from adaptive_merge.data.corruptions import CorruptedImages, Corruption, Kind

KINDS = get_args(Kind)
RANDOM = ("motion_blur", "impulse_noise", "gaussian_noise", "spatter")
SIZES = {4: 24, 32: 24, 224: 6}  # pixels → how many images


def pictures(side: int, gray: bool = False) -> am.Images:
    """Smooth shapes with a little grain, as photographs have them."""
    generator = torch.Generator().manual_seed(side)
    coarse = torch.randn(SIZES[side], 1 if gray else 3, side // 4 + 2, side // 4 + 2, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
    pixels = (128 + 60 * smooth + 5 * torch.randn(smooth.shape, generator=generator)).clamp(0, 255).to(torch.uint8)
    labels = torch.arange(len(pixels)) % 3
    return am.Images(pixels[:, 0] if gray else pixels.movedim(1, -1).contiguous(), labels, ["a", "b", "c"])


def corrupted(images: am.Images, kind: str, severity: int = 3, seed: int = 0) -> torch.Tensor:
    return CorruptedImages(images, Corruption(kind, severity, seed)).take(torch.arange(len(images)))


def changes(kind: str, side: int) -> np.ndarray:
    """Mean change of a pixel at each severity."""
    images = pictures(side)
    clean = images.take(torch.arange(len(images))).float()
    return np.array([(corrupted(images, kind, severity).float() - clean).abs().mean() for severity in range(1, 6)])


@pytest.mark.parametrize("kind", KINDS)
def test_each_severity_changes_more_than_the_one_before(kind):
    assert (np.diff(changes(kind, 224)) > 0).all()
    small = np.diff(changes(kind, 32))
    if kind == "spatter":  # severities 1 to 3 are water and 4 and 5 mud, which covers less to begin with
        small = small[[0, 1, 3]]
    if kind == "motion_blur":  # 3 and 4 of CIFAR-10-C differ in the far end of the trail, where its weight is nothing
        assert small[2] >= 0
        small = small[[0, 1, 3]]
    assert (small > 0).all()


@pytest.mark.parametrize("side", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_strongest_changes_more_than_the_weakest(kind, side):
    change = changes(kind, side)
    assert change[4] > change[0]
    assert change[4] > (1 if side >= 32 else 0)  # of 255; a trail scaled to 4 pixels is shorter than one


@pytest.mark.parametrize("gray", [False, True], ids=["color", "gray"])
@pytest.mark.parametrize("side", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_the_same_in_every_batch_and_order(kind, side, gray):
    images = pictures(side, gray)
    first, second = (CorruptedImages(images, Corruption(kind, 4)) for _ in range(2))
    pair, single = first.take(torch.tensor([3, 5])), second.take(torch.tensor([5]))
    assert pair.dtype == torch.uint8 and pair.shape == (2, 3, side, side) and single.shape == (1, 3, side, side)
    assert torch.equal(pair[1:], single)
    assert torch.equal(first.take(torch.tensor([5, 3, 5])), pair[[1, 0, 1]])
    assert torch.equal(first.take(torch.tensor([-1])), second.take(torch.tensor([len(images) - 1])))
    assert second.take(torch.tensor([], dtype=torch.int64)).shape == (0, 3, side, side)


def test_nothing_is_kept_of_a_task_too_large_to_keep(monkeypatch):
    images, every = pictures(32), torch.arange(24)
    kept = CorruptedImages(images, Corruption("gaussian_noise"))
    monkeypatch.setattr(corruptions, "KEEP_BYTES", 1000)
    anew = CorruptedImages(images, Corruption("gaussian_noise"))
    assert not anew.keeps and kept.keeps
    assert torch.equal(anew.take(every), kept.take(every)) and torch.equal(anew.take(every), kept.take(every))
    assert anew.take(every[:0]).shape == (0, 3, 32, 32)


def test_an_image_is_corrupted_once(monkeypatch):
    images = CorruptedImages(pictures(32), Corruption("contrast"))
    done = []
    monkeypatch.setattr(Corruption, "apply", lambda self, image, index: done.append(index) or image)
    for indices in ([3, 7, 3], [7, 1], [1, 3]):
        images.take(torch.tensor(indices))
    assert sorted(done) == [1, 3, 7]


@pytest.mark.parametrize("kind", KINDS)
def test_only_random_kinds_depend_on_the_seed_and_the_index(kind):
    image = pictures(32).take(torch.tensor([0]))[0].numpy()
    say = {key: Corruption(kind, 5, key[0]).apply(image, key[1]) for key in ((0, 0), (1, 0), (0, 1))}
    assert (say[0, 0] != say[1, 0]).any() == (say[0, 0] != say[0, 1]).any() == (kind in RANDOM)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_channels_stay_equal(kind):
    gray = pictures(32, gray=True)
    color = am.Images(gray.pixels[..., None].expand(-1, -1, -1, 3).contiguous(), gray.labels, gray.classes)
    for severity in (2, 5):  # water and mud
        found = corrupted(gray, kind, severity)
        assert torch.equal(found, found[:, :1].expand(-1, 3, -1, -1))
        assert torch.equal(found, corrupted(color, kind, severity))


def test_noise_of_color_images_differs_by_channel():
    for kind in ("gaussian_noise", "impulse_noise"):
        images = pictures(32)
        noise = corrupted(images, kind, 5).float() - images.take(torch.arange(24)).float()
        assert (noise[:, 0] - noise[:, 1]).abs().mean() > noise.abs().mean() / 2


def test_strengths_are_those_of_the_published_tables():
    flat = am.Images(torch.full((24, 32, 32, 3), 128, dtype=torch.uint8), torch.zeros(24, dtype=torch.int64), ["a"])
    large = am.Images(torch.full((2, 224, 224, 3), 128, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), ["a"])
    for images, deviation, share in ((flat, 0.08, 0.03), (large, 0.18, 0.09)):
        assert corrupted(images, "gaussian_noise").float().std() / 255 == pytest.approx(deviation, rel=0.03)
        hit = corrupted(images, "impulse_noise")
        assert (hit != 128).float().mean() == pytest.approx(share, rel=0.05)
        assert (hit == 255).sum() / (hit != 128).sum() == pytest.approx(0.5, abs=0.03)
    clean = pictures(224)
    every = torch.arange(len(clean))
    assert corrupted(clean, "contrast", 1).float().std() < 0.42 * clean.take(every).float().std()
    assert len(corrupted(clean, "pixelate", 5)[0, 0].unique(dim=0)) == 56


def test_motion_blur_leaves_a_trail_within_45_degrees_of_the_horizontal():
    point = np.zeros((3, 64, 64), np.uint8)
    point[0, 32, 32] = 255  # one channel only, so that it is no gray image
    for index in range(20):
        trail = Corruption("motion_blur", 5).apply(point, index)
        rows, columns = np.nonzero(trail[0])
        assert len(rows) > 5 and not trail[1:].any()
        assert (columns <= 32).all() and (abs(rows - 32) <= 32 - columns + 1).all()


def test_fingerprints_tell_base_kind_severity_and_seed_apart():
    base, other = pictures(32), pictures(4)
    made = [
        *(
            CorruptedImages(base, Corruption(kind, severity, seed))
            for kind in KINDS
            for severity in (1, 2)
            for seed in (0, 1)
        ),
        CorruptedImages(other, Corruption("contrast", 1)),
    ]
    prints = {images.fingerprint for images in made} | {base.fingerprint, other.fingerprint}
    assert len(prints) == len(made) + 2
    relabelled = am.Images(base.pixels, base.labels.flip(0), base.classes)
    corruption = Corruption("spatter")
    assert CorruptedImages(relabelled, corruption).fingerprint == CorruptedImages(base, corruption).fingerprint


def test_labels_and_classes_are_those_of_the_base():
    base = pictures(32)
    images = CorruptedImages(base, Corruption("pixelate"))
    assert isinstance(images, am.Images) and len(images) == len(base) == 24
    assert torch.equal(images.labels, base.labels) and images.classes == base.classes
    twice = CorruptedImages(images, Corruption("gaussian_noise"))
    assert not torch.equal(
        twice.take(torch.tensor([0])), CorruptedImages(base, Corruption("gaussian_noise")).take(torch.tensor([0]))
    )


def test_images_travel_without_what_they_keep():
    images = CorruptedImages(pictures(224), Corruption("jpeg_compression"))
    fresh = len(pickle.dumps(images))
    wanted = images.take(torch.arange(6))
    copy = pickle.loads(pickle.dumps(images))  # noqa: S301
    assert len(pickle.dumps(images)) == fresh and torch.equal(copy.take(torch.arange(6)), wanted)


class _Rows(Dataset):
    def __init__(self, images: am.Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return 6

    def __getitem__(self, row: int) -> torch.Tensor:
        return self.images.take(torch.arange(4 * row, 4 * row + 4))


def test_loader_workers_see_the_same_images():
    images = CorruptedImages(pictures(32), Corruption("spatter", 5))
    found = torch.cat(list(DataLoader(_Rows(images), batch_size=None, num_workers=2)))
    assert torch.equal(found, images.take(torch.arange(24)))


def test_settings_come_from_yaml_and_mistakes_are_named():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--corruption", type=Corruption | None)
    for path in ("Corruption", "adaptive_merge.data.corruptions.Corruption"):
        given = {"corruption": {"class_path": path, "init_args": {"kind": "motion_blur", "severity": 2}}}
        made = parser.instantiate_classes(parser.parse_object(given)).corruption
        assert (made.kind, made.severity, made.seed) == ("motion_blur", 2, 0)
    with pytest.raises(am.InputError, match="unknown corruption 'motion_blurr'; did you mean 'motion_blur'"):
        Corruption("motion_blurr")
    with pytest.raises(am.InputError, match="goes from 1 to 5, got 6"):
        Corruption("contrast", 6)
    with pytest.raises(am.InputError, match="must not be negative"):
        Corruption("contrast", seed=-1)
