"""Is what was written what was meant? Each format is loaded by its own library and compared on 32 images."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, Final

import torch
from safetensors.torch import load_file
from torch import Tensor

from adaptive_merge.errors import InputError
from adaptive_merge.export.formats import Job
from adaptive_merge.export.module_file import load_module
from adaptive_merge.export.onnx_graph import INPUT
from adaptive_merge.export.tower import image_size, plain_tower, reference

__all__ = ["BOUNDS", "IMAGES", "verify"]

IMAGES: Final = 32
BOUNDS: Final = {"open_clip": 0.0, "safetensors": 0.0, "hf": 1e-5, "onnx": 1e-5, "module": 1e-6}
_PART: Final = 7  # a second batch size, to see that the graph takes any


def verify(job: Job, format: str) -> float:
    """The largest difference, relative to the largest reference value where that is above 1.

    The images are noise of a fixed seed, normalised as the backbone asks.

    Raises:
        InputError: the difference is above the format's bound, or the library to load it with is missing.
    """
    height, width = image_size(job.module.model.backbone)
    pixels = torch.randint(0, 256, (IMAGES, 3, height, width), generator=torch.Generator().manual_seed(0))
    images = job.module.model.backbone.normalise(pixels.to(torch.uint8))
    wanted = reference(job.module, job.task, images, logits=format in ("onnx", "module"))
    with torch.no_grad():
        found = _LOADERS[format](job)(images)
    if found.shape != wanted.shape or not bool(found.isfinite().all()):
        raise InputError(f"{format}: the export gives {tuple(found.shape)}, expected finite {tuple(wanted.shape)}")
    difference = float((found - wanted).abs().max()) / max(1.0, float(wanted.abs().max()))
    if difference > BOUNDS[format]:
        raise InputError(
            f"{format}: the export differs from the run by {difference:.2e} on {IMAGES} images, allowed are "
            f"{BOUNDS[format]:.0e}; nothing was kept"
        )
    return difference


Model = Callable[[Tensor], Tensor]


def _safetensors(job: Job) -> Model:
    return plain_tower(job.module.model.backbone, load_file(job.folder / "model.safetensors"))


def _open_clip(job: Job) -> Model:
    import open_clip

    model = open_clip.create_model(f"local-dir:{job.folder}").eval()
    return lambda images: model.encode_image(images)


def _huggingface(job: Job) -> Model:
    _need("transformers", "hf")
    from transformers import CLIPVisionModelWithProjection

    model = CLIPVisionModelWithProjection.from_pretrained(str(job.folder), local_files_only=True).eval()
    return lambda images: model(images).image_embeds


def _onnx(job: Job) -> Model:
    _need("onnxruntime", "onnx")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session: Any = onnxruntime.InferenceSession(
        str(job.folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )

    def run(images: Tensor) -> Tensor:
        parts = [images[:_PART], images[_PART:]]
        return torch.cat([torch.from_numpy(session.run(None, {INPUT: part.numpy()})[0]) for part in parts])

    return run


def _module(job: Job) -> Model:
    loaded = load_module(job.folder, job.module.model.backbone.skeleton)
    return loaded.model.shared_features if job.task is None else lambda images: loaded(str(job.task), images)


_LOADERS: Final[dict[str, Callable[[Job], Model]]] = {
    "safetensors": _safetensors,
    "open_clip": _open_clip,
    "hf": _huggingface,
    "onnx": _onnx,
    "module": _module,
}


def _need(package: str, format: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise InputError(f"--verify of {format} needs the package {package!r}: pip install {package}, or leave it out")
