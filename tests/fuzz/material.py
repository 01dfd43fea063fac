"""The files that are mutated, each with what reads it: a target gives a number to compare, or raises our errors."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from conftest import write_manifest, write_suite
from PIL import Image
from safetensors.torch import save_file
from weights.checkpoint_helpers import TOWER, build_clip, write

import adaptive_merge as am
from adaptive_merge.__main__ import main
from adaptive_merge.cli.loading import load_run
from adaptive_merge.data.cache import resized
from adaptive_merge.data.sources import folder_source
from adaptive_merge.runs.checkpoint import read_checkpoint
from adaptive_merge.runs.reading import read_run
from adaptive_merge.suites.class_names import read_class_names
from adaptive_merge.suites.clip_folder import read_clip_suite
from adaptive_merge.suites.loading import read_manifest
from adaptive_merge.weights import read_head, read_weights
from fuzz import mutations

CONFIG = {
    "model": {
        "recipe": "fuzz",
        "lr": 0.01,
        "transforms": [{"class_path": "Ties", "init_args": {"density": 0.5}}],
        "coefficients": {"class_path": "LayerWise", "init_args": {"init": 0.3, "bounds": "clamp"}},
        "adapters": [{"class_path": "FeatureSurgery", "init_args": {"rank": 2}}],
        "objective": {"class_path": "Entropy"},
    },
    "data": {"images_per_task": 2, "protocol": {"class_path": "Holdout", "init_args": {"share": 0.5}}},
    "trainer": {"max_steps": 1, "accelerator": "cpu", "enable_progress_bar": False, "logger": False},
    "run": {"report": False, "guard": "off", "if_exists": "overwrite"},
}  # fmt: skip


class Refused(Exception):
    """The command line has answered with one message and exit code 2."""


@dataclass(frozen=True)
class Target:
    """One kind of input.

    Args:
        file: that is mutated, under the working folder.
        change: in place, from a seed.
        read: → what is compared with the clean one, or None.
        sealed: whether every change must be refused or without effect; others may be another valid input.
    """

    file: str
    change: Callable[[Path, random.Random], None]
    read: Callable[[Path], Any]
    sealed: bool = False


def command(*arguments: str) -> int:
    """The command line, quietly; `Refused` for exit code 2."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(arguments))
    text = err.getvalue()
    if "\x1b" in text or "Traceback" in text or len(text) > 50_000:
        raise AssertionError(f"what was said: {text[:300]!r}")
    if code == 2 and text.count("adaptive-merge: ") == 1:
        raise Refused(text)
    if code:
        raise AssertionError(f"exit code {code}: {text[:300]}")
    return code


def digest(*tensors: torch.Tensor) -> str:
    content = [
        str((tensor.dtype, tuple(tensor.shape))).encode() + tensor.detach().numpy().tobytes() for tensor in tensors
    ]
    return hashlib.sha256(b"".join(content)).hexdigest()


def damage(path: Path, draw: random.Random) -> None:
    path.write_bytes(mutations.damage(path.read_bytes(), draw))


def forged(change: Callable[[Path, random.Random], None]) -> Callable[[Path, random.Random], None]:
    """A change of a file of the suite, with a manifest that agrees to it."""

    def both(path: Path, draw: random.Random) -> None:
        change(path, draw)
        write_manifest(path.parent.parent if path.parent.name in ("images", "experts") else path.parent)

    return both


def change_checkpoint(path: Path, draw: random.Random) -> None:
    content = torch.load(path, weights_only=True)
    if draw.random() < 0.5:
        content["state_dict"] = mutations.change_state(content["state_dict"], draw)
    else:
        content = mutations.strange(content, draw)
    torch.save(content, path)


def change_torch(path: Path, draw: random.Random) -> None:
    torch.save(mutations.change_state(torch.load(path, weights_only=True), draw), path)


def change_head(path: Path, draw: random.Random) -> None:
    """The bytes before the numbers: those have no checksum in these forms."""
    content = path.read_bytes()
    path.write_bytes(mutations.damage(content[:400], draw) + content[400:])


def suite_content(path: Path) -> dict[str, str]:
    """Task → its expert, head and images."""
    suite = am.load_suite(
        str(path.parent if path.name == "suite.json" else next(p for p in path.parents if (p / "suite.json").exists()))
    )
    names = suite.task_vectors.tasks
    parts = {
        name: [suite.task_vectors.vectors[i], suite.heads[name], suite.images[name].pixels, suite.images[name].labels]
        for i, name in enumerate(names)
    }
    return {
        name: digest(*(part if isinstance(part, torch.Tensor) else part.weight for part in own if part is not None))
        for name, own in parts.items()
    }


def of_config(path: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        load_run(str(path))


def of_fit(path: Path) -> None:
    try:
        command(
            "fit",
            "--config",
            str(path),
            "--run.root",
            "fuzzed",
            "--trainer.max_steps",
            "1",
            "--trainer.max_time",
            "00:00:00:10",
        )
    finally:
        shutil.rmtree("fuzzed", ignore_errors=True)


def of_run(path: Path) -> None:
    folder = path.parent if path.parent.name != "checkpoints" else path.parent.parent
    for one in (["inspect", str(folder)], ["choose", str(folder), "run"]):
        with contextlib.suppress(Refused):
            command(*one)
    read_run(folder)


def of_report(path: Path) -> None:
    command("report", str(path.parent), "--output", "fuzzed.html", "--no-tsne")


def of_resume(path: Path) -> None:
    folder = path.parent if path.parent.name != "checkpoints" else path.parent.parent
    command(
        "fit",
        "--config",
        "config.yaml",
        "--run.root",
        str(folder.parent),
        "--run.name",
        folder.name,
        "--run.if_exists",
        "resume",
    )


def of_merge(path: Path) -> str:
    folder = path.parent if path.parent.name != "checkpoints" else path.parent.parent
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return digest(*load_run(str(folder)).merged_state_dict().values())


def of_weights(path: Path) -> str:
    return digest(*read_weights(path).tensors.values())


def of_folder(path: Path) -> str:
    return digest(*read_weights(path.parent).tensors.values())


def of_adapter(path: Path) -> str:
    base = read_weights("tower.safetensors", quick_gelu=True)
    weights = read_weights(path.parent, base=base)
    bank = am.TaskVectors.from_changes(base.tensors, {"task": weights.changes})
    return digest(*weights.tensors.values(), *bank.expert("task").values())


def of_tall(path: Path) -> str:
    experts = am.load_tall(path)
    return digest(*(value for task in experts.tasks for value in experts.expert(task).values()))


def of_module(path: Path) -> str:
    return digest(*am.load_module(path).state_dict().values())


def of_image(path: Path) -> None:
    source = folder_source(path.parent.parent)
    resized(source.load(source.files.index(path)), 32)


def of_clip_suite(path: Path) -> None:
    suite = read_clip_suite(path.parent, read_manifest(path.parent))
    suite.expert_path(suite.tasks[0]), suite.head_path(suite.tasks[0])
    command("data", "check", str(path.parent))


def of_checkpoint(path: Path) -> str:
    content = read_checkpoint(path)
    return digest(*content["state_dict"].values()) + str(content["global_step"])


def of_coefficients(path: Path) -> None:
    am.LayerWise(init=str(path)).bind(am.load_suite("suite").task_vectors)


def prepare(root: Path) -> dict[str, Target]:
    """Write clean files of all kinds into `root`, the working folder; kind → target."""
    (root / "suite").mkdir()
    write_suite(root / "suite")
    (root / "config.yaml").write_text(yaml.safe_dump({"suite": {"name": "suite"}} | CONFIG))
    command("fit", "--config", "config.yaml", "--run.root", ".", "--run.name", "run", "--trainer.logger", "null")
    shutil.copytree("run", "resumed")
    _write_checkpoints(root)
    _write_images(root / "images")
    _write_adapter(root / "lora")
    command("export", "run", "--format", "tall", "--output", "tall")
    command("export", "run", "--format", "module", "--output", "module")
    bank = am.load_suite("suite").task_vectors
    bank.save("bank.safetensors")
    (root / "names.txt").write_text("cat\ndog\nbird\n")
    clip = {"kind": "clip", "architecture": "ViT-B-32-quickgelu", "pretrained": "tower.pt", "experts": "{task}.pt"}
    (root / "clip").mkdir()
    (root / "clip" / "suite.json").write_text(
        json.dumps(clip | {"tasks": ["MNIST", "pets"], "folders": {"pets": "../images"}, "sizes": "any"})
    )
    return _targets()


def _write_checkpoints(root: Path) -> None:
    model = build_clip()
    state = {name: value.detach().clone() for name, value in model.visual.named_parameters()}
    for kind in ("zip", "legacy", "pickle", "pickle-2"):
        write(state, root / f"tower-{kind}.pt", kind)
        write(torch.nn.Sequential(torch.nn.Linear(4, 3)), root / f"head-{kind}.pt", kind)
    save_file(state, root / "tower.safetensors")
    save_file({"weight": torch.randn(3, 4)}, root / "head.safetensors")
    for name, config, content in (
        (
            "open_clip",
            "open_clip_config.json",
            {"model_cfg": TOWER | {"quick_gelu": True}, "preprocess_cfg": {"mean": [0.1] * 3, "std": [1.0] * 3}},
        ),
        (
            "hf",
            "config.json",
            {"vision_config": {"num_attention_heads": 2, "image_size": 32, "hidden_act": "quick_gelu"}},
        ),
    ):
        (root / name).mkdir()
        (root / name / config).write_text(json.dumps(content))
        save_file(state, root / name / ("open_clip_model.safetensors" if name == "open_clip" else "model.safetensors"))


def _write_adapter(folder: Path) -> None:
    """A LoRA adapter of the tower: a product, one with a bias, one with lengths of its own (DoRA), one of patches."""
    draw = torch.Generator().manual_seed(2)
    block, tensors = "base_model.model.transformer.resblocks", {}
    shapes = {f"{block}.0.mlp.c_fc": (256, 64), f"{block}.1.mlp.c_proj": (64, 256)}
    for name, (high, low) in shapes.items():
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, low, generator=draw)
        tensors[f"{name}.lora_B.weight"] = torch.randn(high, 2, generator=draw) / 100
    tensors[f"{block}.0.mlp.c_fc.lora_B.bias"] = torch.randn(256, generator=draw)
    tensors[f"{block}.1.mlp.c_proj.lora_magnitude_vector"] = 1 + torch.rand(64, generator=draw)
    tensors["base_model.model.conv1.lora_A.weight"] = torch.randn(2, 3, 16, 16, generator=draw)
    tensors["base_model.model.conv1.lora_B.weight"] = torch.randn(64, 2, 1, 1, generator=draw) / 100
    tensors["base_model.model.ln_post.weight"] = torch.randn(64, generator=draw)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["c_fc", "c_proj", "conv1"]}
    settings |= {
        "rank_pattern": {"c_proj": 2},
        "alpha_pattern": {r".*0\.mlp.c_fc": 3},
        "auto_mapping": {"base_model_class": "X"},
    }
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")


def _write_images(folder: Path) -> None:
    draw = random.Random(1)
    picture = Image.frombytes("RGB", (40, 30), draw.randbytes(3600))
    for suffix in ("jpg", "png", "bmp", "tif", "webp", "ppm", "gif"):
        place = folder / suffix
        place.mkdir(parents=True)
        (picture.convert("P") if suffix == "gif" else picture).save(
            place / f"a.{'png' if suffix == 'gif' else suffix}",
            format={"jpg": "JPEG", "tif": "TIFF", "gif": "GIF"}.get(suffix),
        )


def _targets() -> dict[str, Target]:
    targets = {
        "configuration, built": Target("config.yaml", mutations.change_yaml, of_config),
        "configuration, run": Target("config.yaml", mutations.change_yaml, of_fit),
        "configuration, bytes": Target("config.yaml", damage, of_config),
        "suite.json": Target("suite/suite.json", mutations.change_json, suite_content, sealed=True),
        "suite.json, bytes": Target("suite/suite.json", damage, suite_content, sealed=True),
        "CLIP suite.json": Target("clip/suite.json", mutations.change_json, of_clip_suite),
        "npz": Target("suite/images/red.npz", damage, suite_content, sealed=True),
        "npz, forged": Target("suite/images/red.npz", forged(mutations.change_npz), suite_content),
        "npz, forged bytes": Target("suite/images/green.npz", forged(damage), suite_content),
        "expert": Target("suite/experts/red.safetensors", damage, suite_content, sealed=True),
        "expert, forged": Target("suite/experts/red.safetensors", forged(mutations.change_safetensors), suite_content),
        "zero, forged": Target("suite/pretrained.safetensors", forged(mutations.change_safetensors), suite_content),
        "heads": Target("suite/heads.safetensors", damage, suite_content, sealed=True),
        "heads, forged": Target("suite/heads.safetensors", forged(mutations.change_safetensors), suite_content),
        "bank": Target("bank.safetensors", damage, lambda path: digest(am.TaskVectors.load(path).vectors), sealed=True),
        "checkpoint of a run": Target("run/checkpoints/last.ckpt", damage, of_checkpoint, sealed=True),
        "checkpoint, merged": Target("run/checkpoints/last.ckpt", damage, of_merge, sealed=True),
        "checkpoint, forged": Target("run/checkpoints/last.ckpt", change_checkpoint, of_merge),
        "checkpoint, resumed": Target("resumed/checkpoints/last.ckpt", change_checkpoint, of_resume),
        "open_clip folder": Target("open_clip/open_clip_config.json", mutations.change_json, of_folder, sealed=True),
        "Hugging Face folder": Target("hf/config.json", mutations.change_json, of_folder, sealed=True),
        "safetensors tower": Target("tower.safetensors", damage, of_weights),
        "safetensors tower, changed": Target("tower.safetensors", mutations.change_safetensors, of_weights),
        "torch tower, changed": Target("tower-zip.pt", change_torch, of_weights),
        "head.safetensors": Target("head.safetensors", damage, read_head),
        "LoRA adapter": Target("lora/adapter_model.safetensors", mutations.change_safetensors, of_adapter),
        "LoRA adapter, bytes": Target("lora/adapter_model.safetensors", damage, of_adapter),
        "LoRA settings": Target("lora/adapter_config.json", mutations.change_json, of_adapter),
        "tall file": Target("tall/tall.safetensors", damage, of_tall, sealed=True),
        "module file": Target("module/module.safetensors", damage, of_module, sealed=True),
        "class names": Target("names.txt", damage, read_class_names),
        "coefficients": Target("run/coefficients.json", mutations.change_json, of_coefficients),
        "coefficients, bytes": Target("run/coefficients.json", damage, of_coefficients),
    }  # fmt: skip
    targets |= {
        f"tower, {kind}": Target(f"tower-{kind}.pt", damage, of_weights)
        for kind in ("zip", "legacy", "pickle", "pickle-2")
    }
    targets |= {
        f"tower, header of {kind}": Target(f"tower-{kind}.pt", change_head, of_weights)
        for kind in ("zip", "legacy", "pickle")
    }
    targets |= {
        f"head, {kind}": Target(f"head-{kind}.pt", damage, read_head)
        for kind in ("zip", "legacy", "pickle", "pickle-2")
    }
    targets |= {
        f"image, {place.name}": Target(str(next(place.iterdir())), damage, of_image)
        for place in sorted(Path("images").iterdir())
    }
    for name in (
        "results.json",
        "metrics.csv",
        "config.yaml",
        "history.safetensors",
        "diagnostics.safetensors",
        "images.safetensors",
    ):
        if Path("run", name).exists():
            targets[f"run, {name}"] = Target(f"run/{name}", damage, of_run)
    targets |= {
        "run, values of results.json": Target("run/results.json", mutations.change_json, of_run),
        "report, values of results.json": Target("run/results.json", mutations.change_json, of_report),
        "report, config.yaml": Target("run/config.yaml", mutations.change_yaml, of_report),
        "report, tensors": Target("run/diagnostics.safetensors", mutations.change_safetensors, of_report),
        "merge, config.yaml": Target("run/config.yaml", mutations.change_yaml, of_merge),
        "resume, metrics.csv": Target("resumed/metrics.csv", damage, of_resume),
    }  # fmt: skip
    return targets
