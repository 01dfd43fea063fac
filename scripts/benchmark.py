"""What an adaptation step costs, against the floor and against the step as the published loops take it.

In one process, alternating round by round:
  (a) floor: forward and backward of the same images through the same tower with plain weights, task by task, and as
      one batch of all tasks' images (joint floor);
  (b) ours: one step of `AdaptiveMerge`, Adam included;
  (c) naive: a fresh merge for every task with λ·τ graph nodes, one backward through all of them, as published.

    python scripts/benchmark.py                          # embedded encoder, then ViT-B/32, T = 2, 4, 8
    python scripts/benchmark.py --model vit_b_32 --tasks 8 --images 1 16 --json bench.json
    python scripts/benchmark.py --start --model vit_b_32 --tasks 8 --images 16
    python scripts/benchmark.py --transforms TSVM IsoC CART --model vit_b_32 --tasks 8 --threads 2

With --wemoe or --e_wemoe: (e) a step of WEMoE or E-WEMoE against (b).
With --spectral: (f) a step of `Spectral`, of which a sixth of the directions is kept, against (b).
With --start: (d) a start in closed form from the images, once, against (b), which then is one epoch of them.

With --transforms: seconds on the clock and on the processors, and the peak of memory, the bank that is given included
and libraries left out (Linux).

Peak memory is taken in a process of its own per contender, because a process never gives its peak back. Times
are CPU seconds of one thread, or event times on CUDA; read the ratios, not the seconds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import multiprocessing
import os
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import open_clip
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import adaptive_merge as am
from adaptive_merge.merge.layout import Layout
from adaptive_merge.merge.passes import combine, project
from adaptive_merge.objectives.functional import entropy
from adaptive_merge.starts.base import Problem
from adaptive_merge.suites.embedded_tower import build_encoder

CLASSES = (397, 196, 45, 10, 10, 43, 10, 47)  # of the eight CLIP tasks
MODELS = {"embedded": (32, 128), "vit_b_32": (224, 512)}
CONTENDERS = ("floor", "joint_floor", "ours", "naive")


def build(model: str) -> nn.Module:
    """The tower with random weights."""
    torch.manual_seed(0)
    logging.disable(logging.WARNING)  # open_clip warns that the weights are random, which is meant
    return build_encoder() if model == "embedded" else open_clip.create_model("ViT-B-32").visual


def workload(model: str, tasks: int, images: int, device: str, with_bank: bool = True):
    """Backbone, bank of synthetic experts (θ₀ + N(0, 1e-3)), heads, and one batch per task."""
    size, width = MODELS[model]
    backbone = build(model).to(device)
    names = [f"task{index}" for index in range(tasks)]
    bank = synthetic_bank(backbone, names) if with_bank else None
    heads = {
        name: 100 * F.normalize(torch.randn(CLASSES[i % 8], width, device=device), dim=-1)
        for i, name in enumerate(names)
    }
    batch = {name: {"image": torch.randn(images, 3, size, size, device=device)} for name in names}
    return backbone, bank, heads, batch


def synthetic_bank(backbone: nn.Module, names: list[str]) -> am.TaskVectors:
    state = {name: value.detach() for name, value in backbone.named_parameters()}
    layout = Layout(tuple(state), tuple(tuple(value.shape) for value in state.values()))
    base = torch.cat([value.flatten() for value in state.values()])
    vectors = base.new_empty(len(names), layout.numel).normal_(0, 1e-3)
    return am.TaskVectors(names, layout, base, vectors, {})


def loss_of(features: Tensor, head: Tensor) -> Tensor:
    return entropy(F.normalize(features.float(), dim=-1) @ head.T).mean()


def floor(backbone, bank, heads, batch, joint: bool = False) -> Callable[[], None]:
    """Forward and backward with plain weights, task by task (as one batch on CUDA)."""
    joint = joint or next(backbone.parameters()).is_cuda

    def step() -> None:
        backbone.zero_grad()
        if joint:
            features = backbone(torch.cat([part["image"] for part in batch.values()])).split(
                [len(p["image"]) for p in batch.values()]
            )
            torch.stack([loss_of(part, heads[task]) for task, part in zip(batch, features)]).sum().backward()
        else:
            for task, part in batch.items():
                loss_of(backbone(part["image"]), heads[task]).backward()

    return step


def joint_floor(*parts) -> Callable[[], None]:
    """The same with the images of all tasks in one batch."""
    return floor(*parts, joint=True)


def ours(backbone, bank, heads, batch) -> Callable[[], None]:
    """One step of the trainer's module, without the trainer around it."""
    return _step(am.AdaMerging(bank, backbone, heads), batch)


def _step(module, batch, learned: str = "") -> Callable[[], None]:
    """One step of a module whose parts of this name learn, or all."""
    module.to(module.experts.device)
    module.log = module.log_dict = lambda *_, **__: None
    optimizer = torch.optim.Adam(module.get_submodule(learned).parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()
        optimizer.step()

    return step


def naive_merge(bank, coefficients: Tensor) -> dict[str, Tensor]:
    """One graph node per product λ·τ."""
    vectors = [bank.layout.unflatten(vector) for vector in bank.vectors]
    bounded = coefficients.clamp(0, 1)
    return {
        name: value + sum(bounded[t, index] * vector[name] for t, vector in enumerate(vectors))
        for index, (name, value) in enumerate(bank.layout.unflatten(bank.pretrained).items())
    }


def naive(backbone, bank, heads, batch) -> Callable[[], None]:
    """The published step: a merge per task, all graphs alive until one backward."""
    coefficients = torch.full((len(bank.tasks), len(bank.names)), 0.3, device=bank.device, requires_grad=True)
    optimizer = torch.optim.Adam([coefficients], lr=1e-3)

    def step() -> None:
        loss = 0.0
        for task, part in batch.items():
            loss = loss + loss_of(
                functional_call(backbone, naive_merge(bank, coefficients), (part["image"],)), heads[task]
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def wemoe(backbone, bank, heads, batch) -> Callable[[], None]:
    """One step of WEMoE on task arithmetic, otherwise as `ours`."""
    return _step(am.AdaptiveMerge(bank, backbone, heads, adapters=[am.WEMoE()]), batch, "model.adapters")


def e_wemoe(backbone, bank, heads, batch) -> Callable[[], None]:
    """The same of E-WEMoE, with the tenth of each task vector that it keeps."""
    return _step(am.AdaptiveMerge(bank, backbone, heads, adapters=[am.EWEMoE()]), batch, "model.adapters")


def spectral(backbone, bank, heads, batch) -> Callable[[], None]:
    """One step of a mask over singular directions, as AdaRank has it on CART's vectors, otherwise as `ours`.

    The decompositions are made once in a run and are not part of a step: random factors stand for them.
    """
    from adaptive_merge.coefficients import spectral as home

    def factors(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rank = min(matrix.shape)
        return torch.randn(matrix.shape[0], rank), torch.rand(rank), torch.randn(rank, matrix.shape[1]) / rank

    home.svd = factors
    return _step(
        am.AdaptiveMerge(bank, backbone, heads, coefficients=am.Spectral(0.3, keep=0.16)), batch, "coefficients"
    )


def start(backbone, bank, heads, batch) -> Callable[[], None]:
    """The compensated regression from the mean of the experts."""
    anchor = bank.pretrained.clone()
    for row in bank.vectors:
        anchor += row / len(bank.tasks)
    problem = Problem(backbone, bank, anchor, {task: [part["image"]] for task, part in batch.items()}, heads)
    method = am.CompensatedRegression()
    return lambda: method.solve(problem)


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def timed(step: Callable[[], None], device: str) -> float:
    start = clock(device)
    step()
    return clock(device) - start


def time_steps(
    model: str, tasks: int, images: int, device: str, rounds: int, contenders: tuple[str, ...]
) -> dict[str, float]:
    """Median seconds per step of each contender, and of our merge and λ-gradient against the naive ones."""
    rounds *= 5 if model == "embedded" else 1  # short steps are noisier
    parts = workload(model, tasks, images, device)
    _, bank, _, _ = parts
    steps = {name: globals()[name](*parts) for name in contenders}
    found = medians(steps, device, rounds)
    if "floor" not in contenders:
        return found
    found |= medians(dict(merges(bank, naive="naive" in contenders)), device, 3 * rounds)
    if device == "cpu":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            steps["ours"]()
            found["ours bf16"] = statistics.median(timed(steps["ours"], device) for _ in range(rounds))
    return found


def medians(steps: dict[str, Callable[[], object]], device: str, rounds: int) -> dict[str, float]:
    """Median seconds of each, round by round, after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            times[name].append(timed(step, device))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def merges(bank, naive: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """Merge and λ-gradient alone: ours once a step, the naive pair once a task and step; and the bank read twice."""
    groups, coefficients = (
        range(len(bank.names)),
        torch.full((len(bank.tasks), len(bank.names)), 0.3, device=bank.device),
    )
    gradients = [torch.ones(shape, device=bank.device) for shape in bank.layout.shapes]
    buffer = torch.empty_like(bank.pretrained)
    yield "merge", lambda: combine(bank, coefficients, groups, buffer)
    yield "gradient", lambda: project(bank, gradients, groups, len(groups))
    yield "bank read twice", lambda: [part.sum() for part in 2 * (bank.pretrained, bank.vectors)]
    half = am.TaskVectors(bank.tasks, bank.layout, bank.pretrained, bank.vectors.bfloat16(), {})
    yield "merge, bfloat16 bank", lambda: combine(half, coefficients, groups, buffer)
    yield "gradient, bfloat16 bank", lambda: project(half, gradients, groups, len(groups))
    if not naive:
        return
    leaf = coefficients.clone().requires_grad_()

    def merge_and_back() -> None:
        for _ in bank.tasks:
            torch.autograd.grad(list(naive_merge(bank, leaf).values()), leaf, gradients)

    yield "naive merge + gradient", merge_and_back


def peak_of(contender: str, model: str, tasks: int, images: int, device: str, limit: int, report) -> None:
    torch.set_num_threads(1)
    # Better a MemoryError here than the kernel's choice of what to kill.
    if device == "cpu":
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    # The floor has plain weights and no bank.
    parts = workload(model, tasks, images, device, with_bank="floor" not in contender)
    step = globals()[contender](*parts)
    del parts  # what the step needs, it holds: ours does without the backbone's own weights
    for _ in range(2):
        step()
    report.send(torch.cuda.max_memory_allocated() if device == "cuda" else resident_peak())


def resident_peak() -> int:
    """Bytes. `ru_maxrss` will not do on Linux: a process inherits the size of the one that started it."""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak(contender: str, *setting) -> int | None:
    """Bytes at the peak of two steps in a fresh process; None where 80 % of the free memory were not enough."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=peak_of, args=(contender, *setting, int(0.8 * free), sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return None
    finally:
        process.join()


def transform_once(model: str, tasks: int, name: str, threads: int, report) -> None:
    torch.set_num_threads(threads)
    bank = synthetic_bank(build(model), [f"task{index}" for index in range(tasks)])
    size = 4 * (tasks + 1) * bank.layout.numel
    Path("/proc/self/clear_refs").write_text("5")  # from here on the peak is counted anew
    before = resident_peak()
    wall, processors = time.perf_counter(), time.process_time()
    getattr(am, name)()(bank)
    seconds = (time.perf_counter() - wall, time.process_time() - processors)
    report.send((*seconds, 1 + (resident_peak() - before) / size, size))


def show_transform(model: str, tasks: int, name: str, threads: int) -> None:
    """Of θ₀ as initialised and full-rank random task vectors, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=transform_once, args=(model, tasks, name, threads, sender))
    process.start()
    sender.close()
    wall, processors, banks, size = receiver.recv()
    process.join()
    print(
        f"{name}, {model}, T = {tasks}, {threads} threads: {wall:.0f} s, {processors:.0f} s on the processors; "
        f"peak {banks:.2f} banks of {size / 2**30:.2f} GiB"
    )
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, nargs="*", default=list(MODELS))
    parser.add_argument("--tasks", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--images", type=int, nargs="*", default=[16], help="images per task and step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--without", choices=CONTENDERS, nargs="*", default=[], help="contenders to leave out")
    parser.add_argument("--no-memory", action="store_true", help="skip the memory processes")
    parser.add_argument("--start", action="store_true", help="only: a start against an epoch of AdaMerging")
    parser.add_argument("--transforms", nargs="*", help="only: these transforms, with their default settings")
    parser.add_argument("--threads", type=int, default=1, help="of --transforms")
    parser.add_argument("--wemoe", action="store_true", help="only: a step of WEMoE against one of AdaMerging")
    parser.add_argument("--e_wemoe", action="store_true", help="only: a step of E-WEMoE against one of AdaMerging")
    parser.add_argument("--spectral", action="store_true", help="only: a step of Spectral against one of AdaMerging")
    parser.add_argument("--surgery", action="store_true", help="only: adapter updates on kept outputs, ViT-B/32")
    parser.add_argument("--json", help="also write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.surgery:
        for name, value in surgery(options.device).items():
            print(f"{name}: {value:.4g}{'' if name == 'ratio' else ' s'}")
        return
    if options.transforms:
        for model, tasks, name in itertools.product(options.model, options.tasks, options.transforms):
            show_transform(model, tasks, name, options.threads)
        return
    libraries = resident_peak()  # a process of the same imports has as much before it begins
    alone = next((name for name in ("start", "wemoe", "e_wemoe", "spectral") if getattr(options, name)), None)
    pair = (alone, "ours") if alone else CONTENDERS
    contenders = tuple(name for name in pair if name not in options.without)
    rows = []
    for model in options.model:
        for tasks in options.tasks:
            for images in options.images:
                setting = (model, tasks, images, options.device)
                row = {"model": model, "tasks": tasks, "images": images, "device": options.device}
                row["peak_bytes"] = {} if options.no_memory else {name: peak(name, *setting) for name in contenders}
                fit = tuple(name for name in contenders if row["peak_bytes"].get(name, 1))
                row["seconds"] = time_steps(*setting, options.rounds, fit)
                row["ratios"] = ratios(row)
                row["library_bytes"] = libraries
                row["parameters"] = sum(value.numel() for value in build(model).parameters())
                rows.append(row)
                show(row)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"torch": torch.__version__, "rows": rows}, file, indent=2)


def surgery(device: str, updates: int = 8000) -> dict[str, float]:
    """Seconds per adapter update of rank 16, d = 512, batch 16: with kept outputs, and recomputing both encoders."""
    backbone, bank, heads, batch = workload("vit_b_32", 8, 16, device)
    width = MODELS["vit_b_32"][1]
    module = am.Surgery(bank, backbone, heads).to(device)
    # The rows come from a cache, so what the pixels are does not matter; the labels are never read.
    images = {
        task: am.Images(torch.zeros(1000, 1, 1, dtype=torch.uint8), torch.zeros(1000).long(), ["a"]) for task in heads
    }
    tower = module.model.backbone.forward
    module.model.backbone.forward = lambda pixels, *_: torch.randn(len(pixels), width, device=device)
    for task, source in images.items():
        whole = {"image": torch.zeros(1000, 1), "index": torch.arange(1000)}
        module.views.features(task, whole, source)
        module.views.expert(task, whole, source)
    module.model.backbone.forward = None  # from here on nothing may ask the tower
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(
        max_steps=updates // 8, num_sanity_val_steps=0, accelerator="gpu" if device == "cuda" else "cpu", **quiet
    )
    kept = timed(lambda: trainer.fit(module, datamodule=am.TaskStream(images)), device) / updates
    module.model.backbone.forward = tower
    part = batch["task0"]

    def recompute() -> None:
        with torch.no_grad():
            features = tower(part["image"])
            target = tower(part["image"], module.views.weights("individual", "task0"))
        distance = am.FeatureDistance().losses(
            module.model("task0", None, features=features), am.Prediction(target, target)
        )
        distance.mean().backward()

    recompute()
    again = statistics.median(timed(recompute, device) for _ in range(3))
    return {
        "update, kept outputs": kept,
        f"{updates} updates, kept outputs": kept * updates,
        "update, both encoders": again,
        "ratio": again / kept,
    }


def ratios(row: dict) -> dict[str, float]:
    seconds, found = row["seconds"], {}
    if {"floor", "ours"} <= seconds.keys():
        found["ours / floor"] = seconds["ours"] / seconds["floor"]
    if {"ours", "naive"} <= seconds.keys():
        found["naive / ours"] = seconds["naive"] / seconds["ours"]
    if {"joint_floor", "ours"} <= seconds.keys():
        found["ours / joint floor"] = seconds["ours"] / seconds["joint_floor"]
    if "merge" in seconds:
        passes = seconds["merge"] + seconds["gradient"]
        half = seconds["merge, bfloat16 bank"] + seconds["gradient, bfloat16 bank"]
        if "naive merge + gradient" in seconds:
            found["naive merge / ours"] = seconds["naive merge + gradient"] / passes
        found["merge + gradient / bank read twice"] = passes / seconds["bank read twice"]
        found["merge + gradient, bfloat16 bank / float32"] = half / passes
    for name in (name for name in ("wemoe", "e_wemoe", "spectral", "start") if name in seconds):
        found[f"{name} / ours"] = seconds[name] / seconds["ours"]
    if "ours bf16" in seconds:
        found["bf16 / fp32"] = seconds["ours bf16"] / seconds["ours"]
    return found


def show(row: dict) -> None:
    figures = [f"{name} {value:.4g} s" for name, value in row["seconds"].items()]
    figures += [
        f"{name} peak {value / 2**30:.2f} GiB" if value else f"{name} needs more memory than is free"
        for name, value in row.get("peak_bytes", {}).items()
    ]
    figures += [f"{name} = {value:.2f}" for name, value in row["ratios"].items()]
    if row.get("peak_bytes", {}).get("start"):
        bank = 4 * row["parameters"] * (row["tasks"] + 1)
        beside, libraries = row["peak_bytes"]["start"] - bank, row["library_bytes"]
        figures.append(f"start peak beside the bank {beside / 2**30:.2f} GiB")
        figures.append(f"the same without interpreter and libraries {(beside - libraries) / 2**30:.2f} GiB")
        figures.append(f"2 models + 1.5 GiB are {4 * 2 * row['parameters'] / 2**30 + 1.5:.2f} GiB")
    print(f"{row['model']}, T = {row['tasks']}, {row['images']} images a task, {row['device']}:")
    print("  " + "\n  ".join(figures))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
