"""The eight tasks of the embedded suite, built from files that ship inside packages.

Every source is fetched through an ordinary package client, checked against a sha256, and turned
into uint8 arrays [N, 32, 32] with int64 labels for three splits. Nothing here trains anything.
"""

import gzip
import hashlib
import io
import json
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ["SIZE", "TASKS", "Split", "Task", "build_task", "fetch_packages"]

SIZE = 32
SEED = 2026
TRAIN, VAL, TEST = 4000, 500, 1000  # upper limits; smaller sources give less

Split = tuple[np.ndarray, np.ndarray]  # uint8 images [N, 32, 32] and int64 labels [N]
Splits = dict[str, Split]  # "train", "val", "test"


# --- packages ---------------------------------------------------------------------------------

WHEEL_OF_SKIMAGE = ["--python-version", "3.12", "--platform", "manylinux_2_28_x86_64",
                    "--platform", "manylinux_2_27_x86_64", "--platform", "manylinux_2_17_x86_64"]  # fmt: skip

PACKAGES: dict[str, tuple[str, str]] = {  # what to ask for: (client, sha256 of the archive)
    "animal-mnist==0.4": (
        "pip",
        "aeebf3d9de4552d6fd2d5701424e1a5b9020f8e5115d68df9db252f2f53ce2ce",
    ),
    "culmus-fancy=0.0.20140315-1": (
        "apt",
        "8cbd4419572b5f8004b9be323cd243c672caeff52372431e46b50875abfc63b3",
    ),
    "culmus=0.133-1": (
        "apt",
        "d13eb8269204532e4239ce0b133343b8f764fb2069e057ea86060e7396101b30",
    ),
    "dataset-fashion-mnist=0.0~git20200523.55506a9-1": (
        "apt",
        "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    ),
    "fonts-freefont-otf=20120503-10": (
        "apt",
        "0b63996c80c6c660424af6d3832818e647960d6f65a51de010bb57dd0762faa7",
    ),
    "fonts-tlwg-garuda-ttf=1:0.7.3-1": (
        "apt",
        "b650a7374cc917bc2ea59bf494ab1d024b9bc036004aa7f67ff6b80c62fe7598",
    ),
    "fonts-tlwg-kinnari-ttf=1:0.7.3-1": (
        "apt",
        "ea50510e185c6b92d8fe2e9e32cc091ac53a52359bd9fd4270f4289431da0cdb",
    ),
    "fonts-tlwg-laksaman-ttf=1:0.7.3-1": (
        "apt",
        "fe7970f2341ba396ad68fb393c9d655222d13959d1c0651676f7f50da0e1de81",
    ),
    "fonts-tlwg-loma-ttf=1:0.7.3-1": (
        "apt",
        "8b50518887b766f2744fae0f3a86c5b33d4b4895cd6ac23613c7745275b754c3",
    ),
    "fonts-tlwg-mono-ttf=1:0.7.3-1": (
        "apt",
        "80789822307a059d6788c79dbcf6b36885b9a9969debd0078b2b28344d920622",
    ),
    "fonts-tlwg-norasi-ttf=1:0.7.3-1": (
        "apt",
        "0162cde56b2ce3b6f3c18899ec0a30c7e18059251e8c4490e2eff4d98872cf6a",
    ),
    "fonts-tlwg-purisa-ttf=1:0.7.3-1": (
        "apt",
        "e9081a871f561b19529659e984e9cdb3f2342b776787c6af9f312e862ff4e36d",
    ),
    "fonts-tlwg-sawasdee-ttf=1:0.7.3-1": (
        "apt",
        "bdee3b0cbbe4c24e165844fc59904611a11594c726ebffec6c0fbcc657a4c317",
    ),
    "fonts-tlwg-typewriter-ttf=1:0.7.3-1": (
        "apt",
        "f8fb13401925d131708c0c4f581feb574355836a2def033b2ae9dba3d99780c2",
    ),
    "fonts-tlwg-typist-ttf=1:0.7.3-1": (
        "apt",
        "d0d148f1f66bb9e89725b0fc504dfbc1b2f34b1db9cd6b376a249f3b31c09b6e",
    ),
    "fonts-tlwg-typo-ttf=1:0.7.3-1": (
        "apt",
        "478e3845ac54739458c49d6583e6a099e869f875826516453b7564ef67c1b67f",
    ),
    "fonts-tlwg-umpush-ttf=1:0.7.3-1": (
        "apt",
        "ec3dfd52c78a095169bb1200910825d9e9559c0eac1043221e0ecd7f048a8808",
    ),
    "fonts-tlwg-waree-ttf=1:0.7.3-1": (
        "apt",
        "43220ac0eb326e20de50c3c29d2e165e327c4be0535cfe8d5b689ea3db11dce4",
    ),
    "mnist@1.1.0": (
        "npm",
        "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390",
    ),
    "scikit-image==0.26.0": (
        "pip",
        "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
    ),
}


def fetch_packages(work: Path) -> None:
    """Download every archive into `work/archives`, check its sha256, unpack into `work/unpacked`."""
    archives, unpacked = work / "archives", work / "unpacked"
    archives.mkdir(parents=True, exist_ok=True)
    for spec, (client, digest) in PACKAGES.items():
        archive = _find(archives, digest)
        if archive is None:
            _download(client, spec, archives)
            archive = _find(archives, digest)
        if archive is None:
            raise ValueError(f"`{spec}` from {client} is not the archive with sha256 {digest}")
        _unpack(archive, unpacked / client)


def _find(folder: Path, digest: str) -> Path | None:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return next((p for p in files if hashlib.sha256(p.read_bytes()).hexdigest() == digest), None)


def _download(client: str, spec: str, folder: Path) -> None:
    commands = {
        "pip": [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
        + (WHEEL_OF_SKIMAGE if spec.startswith("scikit-image") else [])
        + [spec],
        "npm": ["npm", "pack", "--silent", spec],
        "apt": ["apt-get", "download", "-qq", spec],
    }
    subprocess.run(commands[client], cwd=folder, check=True, stdout=subprocess.DEVNULL)


def _unpack(archive: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder)
    elif archive.suffix == ".tgz":
        with tarfile.open(archive) as tarball:
            tarball.extractall(folder, filter="data")
    else:
        subprocess.run(["dpkg", "-x", str(archive), str(folder)], check=True)


# --- scanned, photographed and traced tasks ---------------------------------------------------


def mnist(unpacked: Path) -> Splits:
    """Handwritten digits, 28×28 floats in JSON, padded to 32×32."""
    images, labels = [], []
    for digit in range(10):
        file = unpacked / "npm/package/src/digits" / f"{digit}.json"
        pixels = np.array(json.loads(file.read_text())["data"]).reshape(-1, 28, 28)
        images.append((pixels * 255).round().astype(np.uint8))
        labels.append(np.full(len(pixels), digit))
    return _shuffle_split(_pad(np.concatenate(images)), np.concatenate(labels))


def fashion(unpacked: Path) -> Splits:
    """Photographs of clothes; the package's own test part stays the source of the test images."""
    folder = unpacked / "apt/usr/share/datasets/fashion-mnist"
    parts = {}
    for part, size in (("train", TRAIN + VAL), ("t10k", TEST)):
        images = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())
        labels = gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())
        pixels = _pad(np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28))
        pixels, targets = _distinct(pixels, np.frombuffer(labels, np.uint8, offset=8))
        order = np.random.default_rng(SEED).permutation(len(pixels))[:size]
        parts[part] = pixels[order], targets[order].astype(np.int64)
    images, labels = parts["train"]
    train, val = slice(0, TRAIN), slice(TRAIN, None)
    return {
        "train": (images[train], labels[train]),
        "val": (images[val], labels[val]),
        "test": parts["t10k"],
    }


def animal(unpacked: Path) -> Splits:
    """Silhouettes of animals, 28×28 in a gzip pickle; exact duplicates leave before the split."""
    folder = unpacked / "pip/animal_mnist/data/Animal_MNIST"
    images, labels = (
        _ArraysOnly(io.BytesIO(gzip.decompress((folder / name).read_bytes()))).load()
        for name in ("animal_data_version_3.gz", "animal_label_version_3.gz")
    )
    return _shuffle_split(_pad(images), labels)


class _ArraysOnly(pickle.Unpickler):
    """Rebuilds numpy arrays and refuses every other global of a pickle."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return np._core.multiarray._reconstruct
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not needed for an array of pixels")


def digits(unpacked: Path) -> Splits:
    """Scanned digits of 8×8 pixels and 17 grey levels, enlarged four times."""
    from sklearn.datasets import load_digits

    data = load_digits()
    small = (data.images * (255 / 16)).round().astype(np.uint8)
    large = [np.asarray(Image.fromarray(i).resize((SIZE, SIZE), Image.BICUBIC)) for i in small]
    return _shuffle_split(np.stack(large), data.target, train=1000, val=250)


PHOTOGRAPHS = {  # class: (file, side of a cell in pixels)
    "brick": ("brick.png", 128),
    "grass": ("grass.png", 128),
    "gravel": ("gravel.png", 128),
    "tissue": ("ihc.png", 128),
    "galaxies": ("hubble_deep_field.jpg", 124),
    "cat": ("chelsea.png", 75),
    "coins": ("coins.png", 96),
    "retina": ("retina.jpg", 128),
}


def surface(unpacked: Path) -> Splits:
    """Patches of eight photographs; each photograph is cut into cells, and a cell feeds one split.

    A patch is a square of 48 to 64 pixels inside its cell, reduced to 32×32, so patches of two
    splits never share a pixel. Patches of one split may overlap.
    """
    rng = np.random.default_rng(SEED)
    parts: dict[str, list[tuple[np.ndarray, int]]] = {"train": [], "val": [], "test": []}
    counts = {"train": 320, "val": 60, "test": 120}
    for label, (name, side) in enumerate(PHOTOGRAPHS.values()):
        photo = Image.open(unpacked / "pip/skimage/data" / name).convert("L")
        cells = _cells(photo, side)
        rng.shuffle(cells)
        n_test, n_val = round(len(cells) * 0.25), round(len(cells) * 0.15)
        owners = {
            "test": cells[:n_test],
            "val": cells[n_test : n_test + n_val],
            "train": cells[n_test + n_val :],
        }
        for split, owned in owners.items():
            for draw in range(counts[split]):
                left, top = owned[draw % len(owned)]
                edge = int(rng.integers(48, 65))
                x, y = rng.integers(0, side - edge + 1, 2) + (left, top)
                patch = photo.resize((SIZE, SIZE), Image.BILINEAR, (x, y, x + edge, y + edge))
                parts[split].append((np.asarray(patch), label))
    return _drop_shared({split: _stack(pairs) for split, pairs in parts.items()})


def _cells(photo: Image.Image, side: int) -> list[tuple[int, int]]:
    """Corners of the cells that show something: the black surround of the retina is left out."""
    corners = [(x, y) for y in range(0, photo.height - side + 1, side) for x in range(0, photo.width - side + 1, side)]
    if photo.size != (1411, 1411):
        return corners
    lit = [np.asarray(photo.crop((x, y, x + side, y + side))).min() > 25 for x, y in corners]
    return [corner for corner, shown in zip(corners, lit, strict=True) if shown]


# --- rendered tasks ---------------------------------------------------------------------------

HEBREW = "אבגדהוזחטיכלמנסעפצקרשת"
THAI = "กขคฆงจฉชซฌญฎฏฐฑฒณดตถทธนบปผฝพฟภมยรลวศษสหฬอฮ"
LATIN = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def glyphs(alphabet: str) -> Callable[[Path], Splits]:
    """A task of rendered letters: font families of one split never appear in another."""

    def build(unpacked: Path) -> Splits:
        rng = np.random.default_rng(SEED)
        families: dict[str, list[ImageFont.FreeTypeFont]] = {}
        for file in sorted((unpacked / "apt/usr/share/fonts").rglob("*")):
            if file.suffix in {".ttf", ".otf", ".pfa"} and (font := _usable(file, alphabet)):
                families.setdefault(font.getname()[0].split()[0].lower(), []).append(font)
        names = sorted(families)
        rng.shuffle(names)
        n_test, n_val = max(2, round(len(names) * 0.25)), max(1, round(len(names) * 0.12))
        owners = {
            "test": names[:n_test],
            "val": names[n_test : n_test + n_val],
            "train": names[n_test + n_val :],
        }
        splits = {}
        for split, size in (("train", TRAIN), ("val", VAL), ("test", TEST)):
            pairs = []
            for draw in range(size):
                faces = families[owners[split][rng.integers(len(owners[split]))]]
                label = draw % len(alphabet)
                face = faces[rng.integers(len(faces))]
                pairs.append((_render(alphabet[label], face, rng), label))
            splits[split] = _stack(pairs)
        return _drop_shared(splits)

    return build


def _usable(file: Path, alphabet: str) -> ImageFont.FreeTypeFont | None:
    """The font of `file` if it draws every letter, all of them differently."""
    try:
        font = ImageFont.truetype(str(file), 72)
        drawn = [bytes(font.getmask(letter)) for letter in (*alphabet, "\uffff")]
    except OSError:
        return None
    return font if len(set(drawn)) == len(drawn) and all(map(any, drawn[:-1])) else None


def _render(letter: str, font: ImageFont.FreeTypeFont, rng: np.random.Generator) -> np.ndarray:
    """White on black, tightly framed, with a small random turn, size and place."""
    left, top, right, bottom = font.getbbox(letter)
    width, height = right - left, bottom - top
    side = 2 * max(width, height)
    canvas = Image.new("L", (side, side))
    origin = ((side - width) / 2 - left, (side - height) / 2 - top)
    ImageDraw.Draw(canvas).text(origin, letter, 255, font)
    canvas = canvas.rotate(rng.uniform(-8, 8), Image.BICUBIC)
    edge = max(width, height) * rng.uniform(1.2, 1.5)
    x, y = (side - edge) / 2 + rng.uniform(-0.06, 0.06, 2) * edge
    return np.asarray(canvas.resize((SIZE, SIZE), Image.BOX, (x, y, x + edge, y + edge)))


# --- arrays -----------------------------------------------------------------------------------


def _pad(images: np.ndarray) -> np.ndarray:
    margin = (SIZE - images.shape[1]) // 2
    return np.pad(images, ((0, 0), (margin, margin), (margin, margin)))


def _stack(pairs: list[tuple[np.ndarray, int]]) -> Split:
    images, labels = zip(*pairs, strict=True)
    return _distinct(np.stack(images), np.array(labels, np.int64))


def _distinct(images: np.ndarray, labels: np.ndarray) -> Split:
    """Each image once; an image that carries two different labels leaves altogether."""
    seen: dict[bytes, list[int]] = {}
    for index, image in enumerate(images):
        seen.setdefault(image.tobytes(), []).append(index)
    keep = sorted(same[0] for same in seen.values() if len(set(labels[same].tolist())) == 1)
    return images[keep], labels[keep].astype(np.int64)


def _shuffle_split(images: np.ndarray, labels: np.ndarray, train: int = TRAIN, val: int = VAL) -> Splits:
    images, labels = _distinct(images, labels)
    order = np.random.default_rng(SEED).permutation(len(images))
    cut = np.split(order, [train, train + val, train + val + TEST])[:3]
    return {split: (images[part], labels[part]) for split, part in zip(("train", "val", "test"), cut, strict=True)}


def _drop_shared(splits: Splits) -> Splits:
    """Remove from `train` and `val` what also occurs in a later split."""
    later: set[bytes] = set()
    for split in ("test", "val", "train"):
        images, labels = splits[split]
        keep = [index for index, image in enumerate(images) if image.tobytes() not in later]
        splits[split] = images[keep], labels[keep]
        later.update(image.tobytes() for image in images)
    return splits


# --- the suite --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What the data card says about a task, and how to build it."""

    classes: tuple[str, ...]
    kind: str
    source: str
    licence: str
    build: Callable[[Path], Splits]


TASKS: dict[str, Task] = {
    "mnist": Task(
        tuple("0123456789"), "scanned",
        "npm mnist 1.1.0 (digits of MNIST, LeCun and Cortes)",
        "package: MIT; MNIST itself is usually stated as CC-BY-SA-3.0", mnist,
    ),
    "fashion": Task(
        ("t-shirt", "trouser", "pullover", "dress", "coat",
         "sandal", "shirt", "sneaker", "bag", "ankle boot"), "photographed",
        "Debian dataset-fashion-mnist 0.0~git20200523.55506a9-1 (Zalando)", "MIT", fashion,
    ),
    "animal": Task(
        ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra"),
        "traced", "PyPI animal-mnist 0.4", "MIT", animal,
    ),
    "digits": Task(
        tuple("0123456789"), "scanned",
        "PyPI scikit-learn, load_digits (UCI optical recognition of handwritten digits)",
        "package: BSD-3-Clause; UCI data: CC-BY-4.0 (Alpaydin and Kaynak, 1998)", digits,
    ),
    "surface": Task(
        tuple(PHOTOGRAPHS), "photographed", "PyPI scikit-image 0.26.0, patches of eight photographs",
        "brick, grass, gravel, cat, retina: CC0; galaxies: NASA, public domain; "
        "tissue, coins: no known copyright restrictions", surface,
    ),
    "hebrew": Task(
        tuple(HEBREW), "rendered", "Debian culmus, culmus-fancy, fonts-freefont-otf",
        "fonts GPL-2 or GPL-3, part with font exception; only rendered images are shipped",
        glyphs(HEBREW),
    ),
    "thai": Task(
        tuple(THAI), "rendered", "Debian fonts-tlwg-*-ttf, fonts-freefont-otf",
        "fonts GPL-2+ or GPL-3+ with font exception; only rendered images are shipped",
        glyphs(THAI),
    ),
    "latin": Task(
        tuple(LATIN), "rendered", "Debian, all fonts named above",
        "as hebrew and thai; only rendered images are shipped", glyphs(LATIN),
    ),
}  # fmt: skip


def build_task(name: str, unpacked: Path) -> Splits:
    """Build one task in random order and check what every task promises."""
    rng = np.random.default_rng(SEED)
    splits = {}
    for split, (images, labels) in TASKS[name].build(unpacked).items():
        order = rng.permutation(len(images))
        splits[split] = images[order], labels[order]
    bytes_of = {s: {i.tobytes() for i in images} for s, (images, _) in splits.items()}
    if bytes_of["test"] & (bytes_of["train"] | bytes_of["val"]):
        raise ValueError(f"`{name}` shares images between test and training")
    for images, labels in splits.values():
        if images.dtype != np.uint8 or images.shape[1:] != (SIZE, SIZE):
            raise ValueError(f"`{name}` has images {images.dtype} {images.shape}")
        if labels.min() < 0 or labels.max() >= len(TASKS[name].classes):
            raise ValueError(f"`{name}` has labels outside its {len(TASKS[name].classes)} classes")
    return splits
