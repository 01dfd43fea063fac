"""One writer per format: an adapted model into an empty folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

from adaptive_merge.adapters.heads import Head
from adaptive_merge.engine.module import AdaptiveMerge
from adaptive_merge.errors import InputError
from adaptive_merge.export.module_file import save_module
from adaptive_merge.export.onnx_graph import write_onnx
from adaptive_merge.export.tower import Folded, describe_tower
from adaptive_merge.files import save_json, save_tensors
from adaptive_merge.weights.huggingface import to_huggingface
from adaptive_merge.weights.manifest import Manifest
from adaptive_merge.weights.text_tower import read_text_tower

__all__ = ["FORMATS", "Format", "Job", "write_heads"]

Format = Literal["open_clip", "hf", "onnx", "safetensors", "module"]
OPENAI_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD: Final = (0.26862954, 0.26130258, 0.27577711)
# A text tower of the smallest size: open_clip's loader wants one although the image tower is all there is.
_PLACEHOLDER: Final = {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}


@dataclass(frozen=True)
class Job:
    """What a writer needs.

    Args:
        module: the adapted module.
        folded: its weights and heads as plain tensors.
        task: whose model; None: the merge that all tasks share.
        folder: where to write.
        text: a full CLIP checkpoint whose text tower an open_clip folder is to have.
    """

    module: AdaptiveMerge
    folded: Folded
    task: str | None
    folder: Path
    text: str | None = None

    def manifest(self) -> Manifest:
        """The tower's identity; InputError where it is no plain CLIP vision transformer."""
        return describe_tower(self.module.model.backbone, self.module.recipe)


def _write_safetensors(job: Job) -> None:
    try:
        metadata = job.manifest().to_metadata()
    except InputError:
        metadata = {}  # not a plain CLIP tower: the tensors are all that a file can say of it
    save_tensors(job.folder / "model.safetensors", job.folded.weights, {"format": "pt", **metadata})


def _write_open_clip(job: Job) -> None:
    facts = job.manifest()
    tensors = {f"visual.{name}": value for name, value in job.folded.weights.items()}
    if job.text is None:
        config = dict(_PLACEHOLDER)
        tensors |= _empty_text(facts, config)
    else:
        tower = read_text_tower(job.text)
        if tower.embed_dim != facts.embed_dim:
            raise InputError(
                f"`{job.text}`: its text tower gives {tower.embed_dim} features, the images' tower {facts.embed_dim}; "
                "give the CLIP that the experts were fine-tuned from"
            )
        config = tower.config
        tensors |= tower.tensors
    save_tensors(job.folder / "open_clip_model.safetensors", tensors, {"format": "pt"})
    save_json(job.folder / "open_clip_config.json", _open_clip_config(facts, config))


def _open_clip_config(facts: Manifest, text: dict[str, Any]) -> dict[str, Any]:
    vision: dict[str, Any] = {"image_size": facts.image_size, "layers": facts.layers, "width": facts.width}
    vision |= {"patch_size": facts.patch, "head_width": facts.width // facts.heads}
    if facts.mlp_width != 4 * facts.width:
        vision["mlp_ratio"] = facts.mlp_width / facts.width
    model = {"embed_dim": facts.embed_dim, "quick_gelu": facts.quick_gelu, "vision_cfg": vision, "text_cfg": text}
    preprocess = {"mean": list(facts.mean or OPENAI_MEAN), "std": list(facts.std or OPENAI_STD)}
    preprocess |= {"interpolation": "bicubic", "resize_mode": "shortest"}
    return {"model_cfg": model, "preprocess_cfg": preprocess}


def _empty_text(facts: Manifest, config: dict[str, Any]) -> dict[str, Tensor]:
    """Zeros for every text tensor, so that nobody takes the placeholder for a trained tower."""
    from open_clip.model import CLIP

    tiny = {"layers": 1, "width": 8, "patch_size": 8, "image_size": 8, "head_width": 8}
    model = CLIP(facts.embed_dim, tiny, dict(config), quick_gelu=bool(facts.quick_gelu))
    return {
        name: torch.zeros_like(value) for name, value in model.state_dict().items() if not name.startswith("visual.")
    }


def _write_huggingface(job: Job) -> None:
    facts = job.manifest()
    config = {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "hidden_size": facts.width,
        "intermediate_size": facts.mlp_width,
        "num_hidden_layers": facts.layers,
        "num_attention_heads": facts.heads,
        "num_channels": 3,
        "image_size": facts.image_size,
        "patch_size": facts.patch,
        "projection_dim": facts.embed_dim,
        "hidden_act": "quick_gelu" if facts.quick_gelu else "gelu",
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
    }
    size = facts.image_size
    preprocess = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(facts.mean or OPENAI_MEAN),
        "image_std": list(facts.std or OPENAI_STD),
        "do_convert_rgb": True,
    }
    save_tensors(job.folder / "model.safetensors", to_huggingface(job.folded.weights), {"format": "pt"})
    save_json(job.folder / "config.json", config)
    save_json(job.folder / "preprocessor_config.json", preprocess)


def _write_onnx(job: Job) -> None:
    write_onnx(job.module, job.task, job.folder / "model.onnx")


def _write_module(job: Job) -> None:
    save_module(job.module, job.folder / "module.safetensors")


FORMATS: Final[dict[str, Callable[[Job], None]]] = {
    "open_clip": _write_open_clip,
    "hf": _write_huggingface,
    "onnx": _write_onnx,
    "safetensors": _write_safetensors,
    "module": _write_module,
}


def write_heads(heads: Mapping[str, Head], folder: Path) -> None:
    """`heads.safetensors`: `<task>.<name>` of each tensor of a head, such as `weight` [C, d] and `bias` [C]."""
    tensors = {f"{task}.{name}": value for task, head in heads.items() for name, value in head.state_dict().items()}
    save_tensors(folder / "heads.safetensors", tensors, {"format": "pt"})
