"""CLIP suites on disk whose checkpoints may be stubs, and the measured peak of a run, for the tests of `plan`."""

from __future__ import annotations

import gc
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image

from adaptive_merge.weights.clip import read_architecture
from adaptive_merge.weights.open_clip_names import expected_shapes

# Of 22 million parameters, with 37 tokens an image.
SMALL = {
    "embed_dim": 256,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 96, "layers": 12, "width": 384, "patch_size": 16, "head_width": 64},
}

TINY = SMALL | {"vision_cfg": SMALL["vision_cfg"] | {"layers": 2, "width": 64}}


def write_clip_suite(folder: Path, tasks: int, architecture: str | dict = SMALL, images: int = 12) -> Path:
    """A CLIP suite of `tasks` tasks with `images` black images of two classes each.

    Of the checkpoints only the headers are written: the numbers are a hole in the file, which reads as zeros.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(architecture, dict):
        (folder / "architecture.json").write_text(json.dumps(architecture))
        architecture = str(folder / "architecture.json")
    tower = read_architecture(architecture)
    shapes = expected_shapes(**tower.architecture(), embed_dim=tower.embed_dim)
    names = [f"task{index}" for index in range(tasks)]
    for name in ("pretrained", *names):
        write_stub(folder / f"{name}.safetensors", {f"visual.{key}": shape for key, shape in shapes.items()})
    for name in names:
        write_stub(folder / f"head_{name}.safetensors", {"weight": (2, tower.embed_dim)})
        for index in range(images):
            place = folder / "images" / name / f"class{index % 2}"
            place.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40)).save(place / f"{index}.png")
    suite = {
        "kind": "clip",
        "architecture": architecture,
        "pretrained": "pretrained.safetensors",
        "experts": "{task}.safetensors",
        "heads": "head_{task}.safetensors",
        "tasks": names,
        "folders": {name: f"images/{name}" for name in names},
    }
    (folder / "suite.json").write_text(json.dumps(suite))
    return folder


def write_stub(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of float32 zeros that takes no room on the disk."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * torch.Size(shape).numel()
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)


def measured_peaks(warm: list[str], *runs: list[str]) -> list[int]:
    """Bytes of resident memory at the peak of each `fit`, above what its process has before it.

    The first run, `warm`, is of a small tower: libraries, threads and caches of code are there afterwards. Blocks that
    are let go of go back to the system at once, so that what is resident is what is alive.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    command = [sys.executable, __file__, json.dumps([warm, *runs])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise AssertionError(done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def _resident(field: str) -> int:
    return int(re.search(rf"{field}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def _measure(warm: list[str], *runs: list[str]) -> None:
    from adaptive_merge.__main__ import main

    torch.set_num_threads(1)
    peaks = []
    for run in (warm, *runs):
        gc.collect()
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # from here on the peak is counted anew
        if main(["fit", *run]):
            raise SystemExit("a run failed")
        peaks.append(_resident("VmHWM") - before)
    sys.stdout.write(f"\n{json.dumps(peaks[1:])}\n")


if __name__ == "__main__":
    _measure(*json.loads(sys.argv[1]))
