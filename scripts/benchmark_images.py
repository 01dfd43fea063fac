"""Decoding each time against the decoded cache: images per second that a loader delivers, over generated JPEGs.

python scripts/benchmark_images.py --images 2000 --size 224
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader, Dataset

from adaptive_merge.data.cache import cached_images, resized
from adaptive_merge.data.images import Images
from adaptive_merge.data.sources import FileSource, folder_source

BATCH = 128


class Decoding(Dataset):
    """Batches decoded anew each time."""

    def __init__(self, source: FileSource, size: int, batches: list[torch.Tensor]) -> None:
        self.source, self.size, self.batches = source, size, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, position: int) -> torch.Tensor:
        images = [resized(self.source.load(int(index)), self.size) for index in self.batches[position]]
        return torch.from_numpy(np.stack(images)).movedim(-1, 1)


class Cached(Dataset):
    """The same batches from the cache."""

    def __init__(self, images: Images, batches: list[torch.Tensor]) -> None:
        self.images, self.batches = images, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, position: int) -> torch.Tensor:
        return self.images.take(self.batches[position])


def generate(folder: Path, count: int, seed: int = 0) -> None:
    """JPEGs of about 500 x 375, as in the usual data sets, in four class folders."""
    generator = np.random.default_rng(seed)
    for index in range(count):
        place = folder / f"class{index % 4}"
        place.mkdir(parents=True, exist_ok=True)
        coarse = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
        image.filter(ImageFilter.EDGE_ENHANCE).save(place / f"{index:05d}.jpg", quality=90)


def rate(dataset: Dataset, count: int) -> float:
    """Images per second over one pass."""
    started = time.perf_counter()
    for _ in DataLoader(dataset, batch_size=None):
        pass
    return count / (time.perf_counter() - started)


def measure(count: int, size: int) -> dict[str, float]:
    """Rates of both loaders in shuffled order, and the seconds that the build took."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        generate(Path(place) / "images", count)
        source = folder_source(Path(place) / "images")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        batches = list(order.split(BATCH))
        decoding = rate(Decoding(source, size, batches), count)
        started = time.perf_counter()
        images = cached_images(source, Path(place) / "cache", size, name="benchmark")
        seconds = time.perf_counter() - started
        cached = rate(Cached(images, batches), count)
    return {
        "images": count,
        "decoding_images_per_s": round(decoding, 1),
        "cached_images_per_s": round(cached, 1),
        "times": round(cached / decoding, 1),
        "build_s": round(seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--size", type=int, default=224)
    options = parser.parse_args()
    print(json.dumps(measure(options.images, options.size), indent=2))


if __name__ == "__main__":
    main()
