"""Writers of tiny data sets in the true on-disk format of each of the 20."""

from __future__ import annotations

import json
import pickle
import struct

import numpy as np
from PIL import Image

from adaptive_merge.suites.class_names import clip_task

COUNT = 6


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path, seed=0, size=(24, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(size[1], size[0], 3, seed=seed)).save(path)


def idx(folder, prefix, labels):
    folder.mkdir(parents=True, exist_ok=True)
    images = pixels(len(labels), 28, 28)
    header = struct.pack(">IIII", 0x803, *images.shape)
    (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
    header = struct.pack(">II", 0x801, len(labels))
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(header + bytes(labels))


def mnist_like(name):
    def write(root):
        labels = [index % 10 for index in range(COUNT)]
        for prefix in ("train", "t10k"):
            idx(root / name / "raw", prefix, labels)
        return labels

    return write


def emnist(root):
    labels = [index % 10 for index in range(COUNT)]
    for split in ("byclass", "bymerge", "balanced", "letters", "digits", "mnist"):
        for part in ("train", "test"):
            idx(root / "EMNIST" / "raw", f"emnist-{split}-{part}", labels)
    return labels


def folders(place, names, labels):
    def write(root):
        for index, (name, _) in enumerate(zip(names, labels)):
            save(root / place / name / f"image_{index}.jpg", index)
        return labels

    return write


def cars(root):
    from scipy.io import savemat

    base, labels = root / "stanford_cars", [2, 0, 195]
    (base / "devkit").mkdir(parents=True)
    names = np.array(clip_task("Cars").classes, dtype=object)
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": names})
    kinds = [("class", "O"), ("fname", "O")]
    rows = np.array([(label + 1, f"{index:05d}.jpg") for index, label in enumerate(labels)], dtype=kinds)
    savemat(base / "cars_test_annos_withlabels.mat", {"annotations": rows})
    for index in range(len(labels)):
        save(base / "cars_test" / f"{index:05d}.jpg", index)
    return labels


def resisc45(root):
    base = root / "resisc45"
    for index, name in enumerate(("airplane", "sea_ice", "wetland")):
        for split in ("test", "train"):
            save(base / "NWPU-RESISC45" / name / f"{name}_{split}.jpg", index)
    (base / "resisc45-test.txt").write_text("airplane_test.jpg\nsea_ice_test.jpg\nwetland_test.jpg\n")
    return [0, 35, 44]


def svhn(root):
    from scipy.io import savemat

    (root / "svhn").mkdir(parents=True)
    content = {"X": pixels(32, 32, 3, 4), "y": np.array([[10], [1], [9], [5]], dtype=np.uint8)}
    savemat(root / "svhn" / "test_32x32.mat", content)
    return [0, 1, 9, 5]


def gtsrb(root):
    base, labels = root / "gtsrb", [42, 0, 7]
    lines = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for index, label in enumerate(labels):
        save(base / "GTSRB" / "Final_Test" / "Images" / f"{index:05d}.ppm", index)
        lines.append(f"{index:05d}.ppm;24;20;1;1;20;18;{label}")
    (base / "GT-final_test.csv").write_text("\n".join(lines) + "\n")
    return labels


def dtd(root):
    base = root / "dtd" / "dtd"
    names = ("zigzagged/z_1.jpg", "banded/b_1.jpg", "polka-dotted/p_1.jpg")
    for index, name in enumerate(names):
        save(base / "images" / name, index)
    (base / "labels").mkdir()
    (base / "labels" / "test1.txt").write_text("\n".join(names) + "\n")
    return [46, 0, clip_task("DTD").classes.index("polka-dotted")]


def pcam(root):
    import h5py

    (root / "pcam").mkdir(parents=True)
    with h5py.File(root / "pcam" / "camelyonpatch_level_2_split_test_x.h5", "w") as file:
        file["x"] = pixels(3, 96, 96, 3)
    with h5py.File(root / "pcam" / "camelyonpatch_level_2_split_test_y.h5", "w") as file:
        file["y"] = np.array([1, 0, 1], dtype=np.uint8).reshape(3, 1, 1, 1)
    return [1, 0, 1]


def cifar(folder, test, meta, key, field, classes):
    def write(root):
        labels = [index * 3 % classes for index in range(COUNT)]
        (root / folder).mkdir(parents=True)
        batch = {"data": pixels(COUNT, 3072), field: labels}
        for name in (test, "train", *(f"data_batch_{index}" for index in range(1, 6))):
            (root / folder / name).write_bytes(pickle.dumps(batch))
        names = list(clip_task("CIFAR10" if classes == 10 else "CIFAR100").classes)
        (root / folder / meta).write_bytes(pickle.dumps({key: names}))
        return labels

    return write


def stl10(root):
    base = root / "stl10_binary"
    base.mkdir(parents=True)
    for split in ("train", "test", "unlabeled"):
        (base / f"{split}_X.bin").write_bytes(pixels(3, 3, 96, 96).tobytes())
        (base / f"{split}_y.bin").write_bytes(bytes([10, 1, 4]))
    (base / "class_names.txt").write_text("\n".join(clip_task("STL10").classes))
    return [9, 0, 3]


def pets(root):
    base = root / "oxford-iiit-pet"
    lines = ["Abyssinian_201 1 1 1", "yorkshire_terrier_9 37 2 25", "american_bulldog_203 2 2 1"]
    for index, line in enumerate(lines):
        save(base / "images" / f"{line.split()[0]}.jpg", index)
    (base / "annotations").mkdir()
    (base / "annotations" / "test.txt").write_text("\n".join(lines) + "\n")
    return [0, 36, 1]


def flowers(root):
    from scipy.io import savemat

    base = root / "flowers-102"
    base.mkdir(parents=True)
    savemat(base / "imagelabels.mat", {"labels": np.array([[77, 1, 102, 5]])})
    savemat(base / "setid.mat", {"trnid": [[1]], "valid": [[2]], "tstid": np.array([[3, 4, 1]])})
    for index in range(1, 5):
        save(base / "jpg" / f"image_{index:05d}.jpg", index)
    return [101, 4, 76]


def fer2013(root):
    (root / "fer2013").mkdir(parents=True)
    rows = [(3, "Training"), (0, "PublicTest"), (6, "PrivateTest"), (2, "PublicTest")]
    lines = ["emotion,pixels,Usage"]
    for index, (label, usage) in enumerate(rows):
        lines.append(f"{label},{' '.join(map(str, pixels(48 * 48, seed=index)))},{usage}")
    (root / "fer2013" / "fer2013.csv").write_text("\n".join(lines) + "\n")
    return [0, 6, 2]


def food101(root):
    base, chosen = root / "food-101", {"waffles": ["1", "2"], "apple_pie": ["3"]}
    (base / "meta").mkdir(parents=True)
    (base / "meta" / "test.json").write_text(
        json.dumps({name: [f"{name}/{image}" for image in images] for name, images in chosen.items()})
    )
    for name, images in chosen.items():
        for image in images:
            save(base / "images" / name / f"{image}.jpg", int(image))
    return [100, 100, 0]


def sst2(root):
    for index, name in enumerate(("negative", "positive")):
        save(root / "rendered-sst2" / "test" / name / f"{index}.png", index)
    return [0, 1]


WRITERS = {
    "SUN397": folders("sun397/test", ("a_abbey", "a_airplane_cabin", "y_youth_hostel"), [0, 1, 396]),
    "Cars": cars,
    "RESISC45": resisc45,
    "EuroSAT": folders("EuroSAT_splits/test", ("Forest", "HerbaceousVegetation", "SeaLake"), [1, 2, 9]),
    "SVHN": svhn,
    "GTSRB": gtsrb,
    "MNIST": mnist_like("MNIST"),
    "DTD": dtd,
    "PCAM": pcam,
    "CIFAR100": cifar("cifar-100-python", "test", "meta", "fine_label_names", "fine_labels", 100),
    "STL10": stl10,
    "OxfordIIITPet": pets,
    "Flowers102": flowers,
    "FER2013": fer2013,
    "CIFAR10": cifar("cifar-10-batches-py", "test_batch", "batches.meta", "label_names", "labels", 10),
    "Food101": food101,
    "RenderedSST2": sst2,
    "EMNIST": emnist,
    "FashionMNIST": mnist_like("FashionMNIST"),
    "KMNIST": mnist_like("KMNIST"),
}
NEEDS = {"Cars": "scipy", "SVHN": "scipy", "Flowers102": "scipy", "PCAM": "h5py"}
