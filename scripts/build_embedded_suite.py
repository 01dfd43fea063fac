"""Regenerate the embedded suite from packages: images, pre-trained encoder, experts, heads.

    python scripts/build_embedded_suite.py --work build/embedded

Stages leave their results in `--work` and are skipped when these exist, so a run that was stopped
goes on where it was. On two CPU cores everything takes about half an hour. Every choice below was
made on validation images; test images are only copied.
"""

import argparse
import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from embedded_sources import SIZE, TASKS, build_task, fetch_packages
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adaptive_merge.suites.embedded_tower import EMBEDDED_FEATURES, build_encoder

log = logging.getLogger("build_embedded_suite")
LOG_FORMAT = "%(asctime)s %(message)s"

SEED = 0
MEAN, STD = 0.28, 0.35  # of the pooled training images, rounded
HEAD_SCALE = 16.0  # cosine → logit
LABELS_PER_CLASS = 2  # all that pre-training may know of a task

# Pre-training: contrast two views of unlabelled images, classify a handful of labelled ones.
PRETRAIN_STEPS, UNLABELLED, LABELLED = 2000, 144, 72
PRETRAIN_LR, TEMPERATURE, SMOOTHING = 1e-3, 0.2, 0.05

# Experts: the same recipe for every task.
EXPERT_STEPS, EXPERT_BATCH, EXPERT_LR = 640, 64, 3.5e-4
GENTLE = 0.5  # strength of the experts' augmentation; pre-training uses 1

Arrays = dict[str, Tensor]  # "train_images", "train_labels", "val_images", ...


# --- images -----------------------------------------------------------------------------------


def arrays(work: Path) -> dict[str, Arrays]:
    """Build all tasks, or read them back."""
    folder = work / "arrays"
    folder.mkdir(parents=True, exist_ok=True)
    if any(not (folder / f"{name}.safetensors").exists() for name in TASKS):
        fetch_packages(work)
        for name in TASKS:
            splits = build_task(name, work / "unpacked")
            tensors = {
                f"{split}_{part}": torch.from_numpy(np.ascontiguousarray(values))
                for split, pair in splits.items()
                for part, values in zip(("images", "labels"), pair, strict=True)
            }
            save_file(tensors, folder / f"{name}.safetensors")
            log.info("%s: %s", name, {k: len(v) for k, v in tensors.items() if "labels" in k})
    return {name: load_file(folder / f"{name}.safetensors") for name in TASKS}


def normalise(images: Tensor) -> Tensor:
    """Grey values in [0, 1], [B, 32, 32] → what the encoder reads, [B, 3, 32, 32]."""
    return ((images - MEAN) / STD)[:, None].expand(-1, 3, -1, -1)


def augment(images: Tensor, rng: torch.Generator, strength: float = 1.0) -> Tensor:
    """Random affine map, contrast and brightness; at full strength also a cut-out square."""
    n = len(images)

    def uniform(limit: float) -> Tensor:
        return (torch.rand(n, generator=rng) * 2 - 1) * limit * strength

    turn, shear = uniform(math.radians(20)), uniform(0.2)
    wide, high = 1 + uniform(0.25), 1 + uniform(0.25)
    cos, sin = turn.cos(), turn.sin()
    rows = [cos * wide, (shear - sin) * high, uniform(0.2), sin * wide, cos * high, uniform(0.2)]
    grid = F.affine_grid(torch.stack(rows, 1).view(n, 2, 3), [n, 1, SIZE, SIZE], False)
    pixels = images[:, None].float() / 255
    pixels = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)[:, 0]
    pixels = pixels * (1 + uniform(0.4))[:, None, None] + uniform(0.1)[:, None, None]
    if strength == 1:
        at = torch.randint(0, SIZE, (2, n, 1), generator=rng)
        near = (torch.arange(SIZE) - at).abs() <= 4
        pixels = pixels.masked_fill(near[0][:, :, None] & near[1][:, None, :], 0.0)
    return pixels.clamp(0, 1)


# --- training ---------------------------------------------------------------------------------


def optimizer_of(modules: nn.Module, lr: float, decay: float) -> torch.optim.AdamW:
    matrices = [p for p in modules.parameters() if p.ndim > 1]
    vectors = [p for p in modules.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))


def schedule(optimizer: torch.optim.Optimizer, lr: float, warmup: int, steps: int) -> Iterator[int]:
    """Count the steps while the learning rate rises for `warmup` of them and falls as a cosine."""
    for step in range(steps):
        rate = min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = lr * rate
        yield step


class Heads(nn.Module):
    """One cosine classifier per task; frozen for ever once pre-training ends."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.ParameterDict(
            {name: nn.Parameter(torch.randn(len(t.classes), EMBEDDED_FEATURES)) for name, t in TASKS.items()}
        )  # fmt: skip

    def scaled(self, task: str) -> Tensor:
        """Rows of length `HEAD_SCALE`: logits are `normalize(features) @ scaled.T`."""
        return F.normalize(self.weight[task], dim=1) * HEAD_SCALE


def few_labels(tasks: dict[str, Arrays], rng: torch.Generator) -> dict[str, Tensor]:
    """Indices of `LABELS_PER_CLASS` training images of every class."""
    chosen = {}
    for name, data in tasks.items():
        order = torch.randperm(len(data["train_labels"]), generator=rng)
        labels = data["train_labels"][order]
        rows = [order[labels == c][:LABELS_PER_CLASS] for c in range(len(TASKS[name].classes))]
        chosen[name] = torch.cat(rows)
    return chosen


def pretrain(tasks: dict[str, Arrays]) -> dict[str, Tensor]:
    """θ₀ and the heads: SimCLR on all training images plus cross-entropy on a few labels."""
    torch.manual_seed(SEED)
    rng = torch.Generator().manual_seed(SEED)
    encoder, heads = build_encoder(), Heads()
    projector = nn.Sequential(
        nn.Linear(EMBEDDED_FEATURES, EMBEDDED_FEATURES), nn.GELU(), nn.Linear(EMBEDDED_FEATURES, 64)
    )
    everything = nn.ModuleList([encoder, heads, projector])
    optimizer = optimizer_of(everything, PRETRAIN_LR, decay=0.05)
    few = few_labels(tasks, rng)
    start = time.time()
    for step in schedule(optimizer, PRETRAIN_LR, 200, PRETRAIN_STEPS):
        unlabelled = torch.cat([_draw(tasks[n], UNLABELLED // len(TASKS), rng)[0] for n in TASKS])
        drawn = {n: _draw(tasks[n], LABELLED // len(TASKS), rng, few[n]) for n in TASKS}
        labelled = torch.cat([images for images, _ in drawn.values()])
        views = augment(torch.cat([unlabelled, unlabelled, labelled]), rng)
        features = encoder(normalise(views))
        contrast = _simclr(projector(features[: 2 * UNLABELLED]))
        parts = features[2 * UNLABELLED :].split(LABELLED // len(TASKS))
        classify = sum(
            F.cross_entropy(F.normalize(x, dim=1) @ heads.scaled(n).T, y, label_smoothing=SMOOTHING)
            for x, (n, (_, y)) in zip(parts, drawn.items(), strict=True)
        )
        loss = contrast + classify / len(TASKS)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(everything.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == PRETRAIN_STEPS - 1:
            accuracy = [evaluate(encoder, heads.scaled(n), tasks[n], "val") for n in TASKS]
            log.info(
                "pre-training %d: loss %.3f, contrast %.3f, %.0f s, val %.1f: %s",
                step, loss.item(), contrast.item(), time.time() - start,
                np.mean(accuracy), " ".join(f"{a:.1f}" for a in accuracy),
            )  # fmt: skip
    state = {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
    return state | {f"heads.{n}": heads.scaled(n).detach() for n in TASKS}


def _draw(data: Arrays, n: int, rng: torch.Generator, among: Tensor | None = None) -> tuple[Tensor, Tensor]:
    size = len(data["train_labels"] if among is None else among)
    index = torch.randint(size, (n,), generator=rng)
    index = index if among is None else among[index]
    return data["train_images"][index], data["train_labels"][index]


def _simclr(projected: Tensor) -> Tensor:
    """Each view has to find the other view of its image among all views of the batch."""
    z = F.normalize(projected, dim=1)
    similarity = (z @ z.T / TEMPERATURE).fill_diagonal_(-math.inf)
    partner = torch.arange(len(z)).roll(len(z) // 2)
    return F.cross_entropy(similarity, partner)


def fine_tune(name: str, data: Arrays, base: dict[str, Tensor], head: Tensor) -> dict[str, Tensor]:
    """One expert θₜ: cross-entropy on its labelled training images under the frozen head."""
    rng = torch.Generator().manual_seed(SEED)
    encoder = build_encoder()
    encoder.load_state_dict(base)
    optimizer = optimizer_of(encoder, EXPERT_LR, decay=0.0)
    start, total = time.time(), 0.0
    for step in schedule(optimizer, EXPERT_LR, 50, EXPERT_STEPS):
        images, labels = _draw(data, EXPERT_BATCH, rng)
        features = encoder(normalise(augment(images, rng, GENTLE)))
        loss = F.cross_entropy(F.normalize(features, dim=1) @ head.T, labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        total += loss.item()
        if step % 160 == 159:
            accuracy = evaluate(encoder, head, data, "val")
            seconds = time.time() - start
            log.info("%s %d: loss %.3f val %.1f, %.0f s", name, step + 1, total / 160, accuracy, seconds)
            total = 0.0
    return encoder.state_dict()


def train_expert(name: str, work: Path) -> None:
    """Fine-tune one expert in a process of its own."""
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    torch.set_num_threads(1)
    state = load_file(work / "pretrained.safetensors")
    data = load_file(work / "arrays" / f"{name}.safetensors")
    expert = fine_tune(name, data, _part(state, "encoder."), state[f"heads.{name}"])
    save_file(expert, _expert_file(work, name))


def _expert_file(work: Path, name: str) -> Path:
    return work / "experts" / f"{name}.safetensors"


@torch.no_grad()
def evaluate(encoder: nn.Module, head: Tensor, data: Arrays, split: str) -> float:
    """Accuracy in per cent."""
    images, labels = data[f"{split}_images"], data[f"{split}_labels"]
    features = torch.cat([encoder(normalise(x.float() / 255)) for x in images.split(500)])
    return 100 * (features @ head.T).argmax(1).eq(labels).double().mean().item()


# --- assets -----------------------------------------------------------------------------------


def export(work: Path, output: Path, tasks: dict[str, Arrays]) -> None:
    """Write everything the package ships, weights as float16."""
    (output / "experts").mkdir(parents=True, exist_ok=True)
    (output / "images").mkdir(exist_ok=True)
    state = load_file(work / "pretrained.safetensors")
    save_file(_half(_part(state, "encoder.")), output / "pretrained.safetensors")
    heads = {f"{n}.weight": state[f"heads.{n}"].contiguous() for n in TASKS}
    save_file(heads, output / "heads.safetensors")
    for name, data in tasks.items():
        expert = load_file(_expert_file(work, name))
        save_file(_half(expert), output / "experts" / f"{name}.safetensors")
        shipped = {k: v.numpy() for k, v in data.items() if not k.startswith("train")}
        np.savez_compressed(output / "images" / f"{name}.npz", **shipped)
    files = [p for p in sorted(output.rglob("*")) if p.suffix in {".safetensors", ".npz"}]
    suite = {
        "schema": 1,
        "name": "embedded",
        "image_size": SIZE,
        "mean": [MEAN] * 3,
        "std": [STD] * 3,
        "head_scale": HEAD_SCALE,
        "tasks": {
            name: {
                "classes": list(task.classes),
                **{f"n_{s}": len(tasks[name][f"{s}_labels"]) for s in ("test", "val", "train")},
                "source": task.source,
                "licence": task.licence,
                "kind": task.kind,
            }
            for name, task in TASKS.items()
        },
        "files": {p.relative_to(output).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files},
    }
    (output / "suite.json").write_text(json.dumps(suite, indent=2, ensure_ascii=False) + "\n")


def _half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.half().contiguous() for name, value in state.items()}


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def report(output: Path, tasks: dict[str, Arrays], split: str) -> None:
    """Accuracy of the shipped float16 weights: pre-trained, task arithmetic at 0.3, individual."""
    base = {k: v.float() for k, v in load_file(output / "pretrained.safetensors").items()}
    heads = load_file(output / "heads.safetensors")
    experts = {n: {k: v.float() for k, v in load_file(output / "experts" / f"{n}.safetensors").items()} for n in TASKS}
    merged = {k: v + 0.3 * sum(e[k] - v for e in experts.values()) for k, v in base.items()}
    encoder, rows = build_encoder().eval(), []
    for name, data in tasks.items():
        row = []
        for state in (base, merged, experts[name]):
            encoder.load_state_dict(state)
            row.append(evaluate(encoder, heads[f"{name}.weight"], data, split))
        rows.append(row)
        log.info("%s %s: pre-trained %.1f, TA 0.3 %.1f, individual %.1f", split, name, *row)
    log.info("%s mean: %.1f, %.1f, %.1f", split, *np.mean(rows, axis=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(__file__).resolve().parent.parent
    parser.add_argument("--output", type=Path, default=here / "adaptive_merge/suites/embedded")
    parser.add_argument("--work", type=Path, required=True, help="downloads and stage results")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    torch.set_num_threads(args.threads)
    tasks = arrays(args.work)
    pretrained = args.work / "pretrained.safetensors"
    if not pretrained.exists():
        save_file(pretrain(tasks), pretrained)
    (args.work / "experts").mkdir(exist_ok=True)
    missing = [n for n in TASKS if not _expert_file(args.work, n).exists()]
    # Several experts with one thread each: nearly twice as fast as one after the other.
    with ProcessPoolExecutor(args.threads, get_context("spawn")) as pool:
        list(pool.map(train_expert, missing, [args.work] * len(missing)))
    export(args.work, args.output, tasks)
    report(args.output, tasks, "val")


if __name__ == "__main__":
    main()
