"""Which files of a folder are images, which class is which label, and which numbers are white."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import adaptive_merge as am
from adaptive_merge.data.cache import resized
from adaptive_merge.data.sources import eight_bit, folder_source, images_in

RAMP = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(8, 8)
WIDE = RAMP.astype(np.uint16) * 257  # the same gray in 16 bits


def read(path):
    source = folder_source(path.parent.parent)
    return np.asarray(source.load(source.files.index(path)))


def place(tmp_path, name):
    (tmp_path / "images" / "a").mkdir(parents=True, exist_ok=True)
    return tmp_path / "images" / "a" / name


def pgm(path, maximum):
    values = (RAMP.astype(np.float64) / 255 * maximum).round().astype(">u2" if maximum > 255 else "u1")
    path.write_bytes(b"P5 8 8 %d\n" % maximum + values.tobytes())


GRAY = {
    "16-bit png": ("x.png", lambda path: Image.fromarray(WIDE).save(path)),
    "16-bit tiff": ("x.tif", lambda path: Image.fromarray(WIDE).save(path)),
    "16-bit big-endian tiff": ("x.tiff", lambda path: Image.fromarray(WIDE.astype(">u2")).save(path)),
    "16-bit pgm": ("x.pgm", lambda path: pgm(path, 65535)),
    "12-bit pgm": ("x.pgm", lambda path: pgm(path, 4095)),
    "8-bit pgm": ("x.pgm", lambda path: pgm(path, 255)),
    "8-bit png": ("x.png", lambda path: Image.fromarray(RAMP).save(path)),
    "gray and alpha": ("x.png", lambda path: Image.fromarray(RAMP).convert("LA").save(path)),
    "palette": ("x.png", lambda path: Image.fromarray(RAMP).convert("P").save(path)),
    "rgb": ("x.png", lambda path: Image.fromarray(RAMP).convert("RGB").save(path)),
    "rgba": ("x.png", lambda path: Image.fromarray(RAMP).convert("RGBA").save(path)),
    "rgb tiff": ("x.tif", lambda path: Image.fromarray(RAMP).convert("RGB").save(path)),
}


@pytest.mark.parametrize("kind", GRAY)
def test_the_same_gray_is_the_same_gray_in_every_mode(tmp_path, kind):
    name, save = GRAY[kind]
    path = place(tmp_path, name)
    save(path)
    found = read(path)
    assert found.shape == (8, 8, 3) and found.dtype == np.uint8
    assert np.abs(found.astype(int) - RAMP[..., None]).max() <= (1 if "12" in kind else 0)


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "YCbCr", "HSV", "L", "1", "P", "RGBA", "LA", "RGBX"])
def test_other_modes_are_what_pillow_makes_of_them(mode):
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert("L" if mode == "LA" else "RGB").convert(mode)
    assert eight_bit(image) is image


@pytest.mark.parametrize("alpha", ["palette", "RGBA", "LA"])
def test_alpha_is_dropped_as_torchvisions_loaders_drop_it(tmp_path, alpha):
    path = place(tmp_path, "x.png")
    if alpha == "palette":
        Image.fromarray(RAMP).convert("P").save(path, transparency=3)
    else:
        image = Image.fromarray(RAMP).convert(alpha)
        image.putalpha(Image.fromarray(255 - RAMP))
        image.save(path)
    from torchvision.datasets.folder import default_loader

    assert np.array_equal(read(path), np.asarray(default_loader(str(path))))


UNKNOWN = {
    "float tiff": ("x.tif", lambda path: Image.fromarray(RAMP.astype(np.float32) / 255).save(path), "F"),
    "float tiff of 0 to 255": ("x.tif", lambda path: Image.fromarray(RAMP.astype(np.float32)).save(path), "F"),
    "32-bit tiff": ("x.tif", lambda path: Image.fromarray(RAMP.astype(np.int32) * 1000).save(path), "I"),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_a_mode_that_does_not_say_what_is_white_is_refused_with_the_file(tmp_path, kind):
    name, save, mode = UNKNOWN[kind]
    path = place(tmp_path, name)
    save(path)
    with pytest.raises(am.InputError, match=f"{name}`: not a readable image .its mode is '{mode}'"):
        read(path)
    with pytest.raises(am.InputError, match="does not say which of its numbers is white"):
        resized(Image.open(path), 4)


def image(path, value=7):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(path)


CLUTTER = [
    "cat/._0.png",
    "cat/.hidden.png",
    "cat/.thumbnails/0.png",
    "cat/__MACOSX/0.png",
    "cat/__MACOSX/cat/._0.png",
    "cat/sub/.AppleDouble/0.png",
    "cat/@eaDir/0.png/SYNOPHOTO_THUMB_M.png",
    "__MACOSX/cat/._0.png",
    ".thumbnails/cat/0.png",
    ".ipynb_checkpoints/0.png",
    "@eaDir/cat/0.png",
]


@pytest.mark.parametrize("clutter", [*CLUTTER, "all"])
def test_what_systems_leave_behind_is_neither_an_image_nor_a_class(tmp_path, clutter):
    for name in ("cat/0.png", "cat/sub/1.png", "dog/0.png"):
        image(tmp_path / name)
    for name in CLUTTER if clutter == "all" else [clutter]:
        image(tmp_path / name)
    source = folder_source(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in source.files] == ["cat/0.png", "cat/sub/1.png", "dog/0.png"]
    assert source.classes == ["cat", "dog"] and source.labels.tolist() == [0, 0, 1]
    assert [path.name for path in images_in(tmp_path / "cat")] == ["0.png", "1.png"]


def test_links_are_followed_and_circles_end(tmp_path):
    image(tmp_path / "elsewhere" / "deep" / "1.png")
    image(tmp_path / "set" / "cat" / "0.png")
    (tmp_path / "set" / "cat" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "cat" / "one.png").symlink_to(tmp_path / "elsewhere" / "deep" / "1.png")
    (tmp_path / "set" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "cat" / "gone.png").symlink_to(tmp_path / "nowhere")
    source = folder_source(tmp_path / "set")
    names = [str(path.relative_to(tmp_path / "set")) for path in source.files]
    assert {"cat/0.png", "cat/linked/deep/1.png", "cat/one.png", "dog/deep/1.png"} <= set(names)
    assert source.classes == ["cat", "dog"] and len(names) < 20


@pytest.mark.parametrize(
    "names, told",
    [
        ([str(i) for i in range(11)], "'10' is label 2"),
        ([str(i) for i in range(1, 102)], "'100' is label 2"),
        (["7", "12"], "'12' is label 0"),
        ([str(i) for i in range(10)], None),
        ([f"{i:02}" for i in range(11)], None),
        (["0", "1", "10", "a"], None),
        (["class_10", "class_2"], None),
        (["5"], None),
    ],
)
def test_numbers_sorted_as_text_are_told_with_the_mapping(tmp_path, caplog, names, told):
    for name in names:
        image(tmp_path / name / "0.png")
    source = folder_source(tmp_path)
    assert source.classes == sorted(names) and source.labels.tolist() == list(range(len(names)))
    assert (told in caplog.text and len(caplog.records) == 1) if told else not caplog.records
    assert torch.equal(source.labels, torch.arange(len(names)))
