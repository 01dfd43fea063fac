"""`adaptive-merge plan`: what a `fit` of the same arguments would read, take and write, before it is started."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

import pytorch_lightning as pl
import torch
from jsonargparse import Namespace
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from adaptive_merge.cli.fit import AdaptiveMergeCLI
from adaptive_merge.cli.parser import Parser, write
from adaptive_merge.cli.trainer import check_end, check_trainer
from adaptive_merge.data.stream import TaskStream
from adaptive_merge.engine.footprint import KINDS, bank_bytes, footprint
from adaptive_merge.engine.module import AdaptiveMerge
from adaptive_merge.engine.traced import traced
from adaptive_merge.errors import InputError, printable
from adaptive_merge.limits import check_names
from adaptive_merge.runs.checkpoint_io import check_writable
from adaptive_merge.runs.folder import check_name, claim
from adaptive_merge.runs.journal import Journal
from adaptive_merge.suites.check import TaskCheck, check_suite
from adaptive_merge.weights.headers import headers_only

__all__ = ["plan"]

_SHOWN: Final = {
    "bank": "bank on the device",
    "towers": "merged tower, an expert's",
    "gradients": "gradients",
    "activations": "activations",
    "exchange": "exchange",
    "state": "what learns, optimiser",
    "rule": "what the rule keeps",
    "evaluation": "scoring, in its turn",
}
_HOST: Final = {
    "bank": "bank in host memory",
    "transformed": "bank of transforms",
    "start": "bank around a start",
    "loaded": "tower as loaded",
    "initial": "state of the first merge",
    "images": "images",
    "outputs": "outputs of experts",
}


def plan(arguments: list[str]) -> None:
    """Say what `fit` with these arguments would read, take and write; nothing is written, no expert is read."""
    parser = Parser(
        "adaptive-merge plan", description=plan.__doc__, epilog="All other options are those of adaptive-merge fit."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--processes", type=int, help="of the whole run (default: trainer.devices × trainer.num_nodes, 1 where open)"
    )
    parser.add_argument(
        "--probe",
        type=int,
        default=0,
        metavar="N",
        help="also time N steps on this machine, on one device; this reads experts and images as fit does",
    )
    options, rest = parser.parse_known_args(arguments)
    result = _plan(rest, options.processes, options.probe)
    if options.json:
        Console().print_json(json.dumps(result))
    else:
        _show(result)
    if wrong := [task for task, row in result["tasks"].items() if row["problem"]]:
        raise InputError(f"{len(wrong)} of {len(result['tasks'])} tasks cannot be used yet: {', '.join(wrong)}")


class _Outline(AdaptiveMergeCLI):
    """Module and stream of a `fit`, and the settings of the rest; no trainer, no folder, no run."""

    checks: list[TaskCheck]

    def before_instantiate_classes(self) -> None:
        settings = self.settings
        check_trainer(settings.trainer)
        check_names(self.folder.parts[1:], "folder of a run", "--run.name")
        check_name(settings.run.root, self.run_name)
        check_writable(self.folder)
        claim(Journal(self.folder), settings.run.if_exists, settings.ckpt_path)
        self.checks = check_suite(settings.suite.name, tasks=settings.suite.tasks)
        # Loggers and callbacks may want what this machine has not; what they are made of is checked by now.
        self.asked = settings.trainer.clone()
        settings.trainer.callbacks, settings.trainer.logger = None, False

    def instantiate_classes(self) -> None:
        if not any(check.problem for check in self.checks):
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> None:
        return None

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def _plan(arguments: Sequence[str], processes: int | None, probe: int) -> dict[str, Any]:
    with headers_only():
        cli = _Outline(args=["fit", *arguments])
        rows = {row.task: {key: getattr(row, key) for key in ("images", "classes", "problem")} for row in cli.checks}
        result = {"recipe": cli.settings.model.recipe, "suite": cli.settings.suite.name, "tasks": rows}
        if not any(row["problem"] for row in rows.values()):
            world = processes or _world(cli.asked)
            result |= _of_run(cli.model, cli.datamodule, cli.asked, world) | {"files": _files(cli)}
    if probe and "steps" in result:
        result["probe"] = _probe(_Outline(args=["fit", *arguments]), probe, result["steps"])
    return result


def _world(trainer: Namespace) -> int:
    devices = trainer.devices
    count = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 1
    return max(count, 1) * int(trainer.num_nodes)


def _of_run(module: AdaptiveMerge, stream: TaskStream, trainer: Namespace, world: int) -> dict[str, Any]:
    if trainer.max_steps != 0:
        module.check_learns()
    check_end(trainer, endless=not stream.draws.end)
    sizes, on_cpu = _sizes(stream, world), _on_cpu(trainer)
    image = tuple(stream.images[next(iter(sizes))].take(torch.zeros(1, dtype=torch.long)).shape[1:])
    scored = min(stream.eval_batch_size, max(map(len, stream.images.values())))
    trace = traced(module, sizes, scored, image, world, str(trainer.precision).startswith(("bf16", "16")))
    memory = {kind: asdict(footprint(module, trace, stream.images, kind, world, on_cpu)) for kind in KINDS}
    return {
        "experts": len(module.tasks),
        "parameters": module.experts.layout.numel,
        "learned": sum(parameter.numel() for parameter in module.learned),
        "processes": world,
        "device": "cpu" if on_cpu else "accelerator",
        "placement": module.model.backbone.kind,
        "memory": memory,
        "step": {
            "images": sum(len(index) for index in stream.draws[0].values()),
            "graph": "joint" if trace.joint else "per_task",
            "exact": trace.exact,
        },
        "steps": _steps(stream, trainer),
    }


def _steps(stream: TaskStream, trainer: Namespace) -> int | None:
    """Of the optimiser; None where time alone ends the run."""
    known = [] if trainer.max_steps == -1 else [trainer.max_steps]
    if stream.draws.end is not None:
        known.append(-(-stream.draws.end // trainer.accumulate_grad_batches))
    return min(known, default=None)


def _sizes(stream: TaskStream, world: int) -> dict[str, int]:
    """Task → images of a step on the first process, which has the most."""
    first = {task: len(index) for task, index in stream.draws[0].items()}
    if stream.share == "tasks":
        return {task: first[task] for task in list(first)[::world]}
    return {task: -(-size // world) for task, size in first.items()}


def _on_cpu(trainer: Namespace) -> bool:
    return trainer.accelerator == "cpu" or (trainer.accelerator == "auto" and not torch.cuda.is_available())


def _files(cli: _Outline) -> dict[str, int | None]:
    """What would be written → its bytes, where they are known before."""
    module, settings = cli.model, cli.settings
    learned = 4 * sum(parameter.numel() for parameter in module.learned)
    record = ("images", "history", "diagnostics")
    names: dict[str, int | None] = {
        **dict.fromkeys(("config.yaml", "metrics.csv", "results.json", *(f"{name}.safetensors" for name in record))),
        "checkpoints/last.ckpt": 3 * learned,
    }
    names |= {"coefficients.json": None} if module.coefficients.display() is not None else {}
    names |= {"start.safetensors": 8 * module.experts.layout.numel} if module.start is not None else {}
    names |= {"report.html": None} if settings.run.report else {}
    files = {str(cli.folder / name): size for name, size in names.items()}
    if settings.suite.banks:
        files[f"{settings.suite.banks}/bank-*.safetensors"] = bank_bytes(module.experts)
    return files


def _probe(cli: _Outline, count: int, steps: int | None) -> dict[str, Any]:
    """Seconds of a step on this machine, on one device; nothing is written but caches of images and banks."""
    times: list[float] = []
    trainer = pl.Trainer(
        max_steps=count + 1,
        max_epochs=-1,
        accelerator=cli.asked.accelerator,
        devices=1,
        precision=cli.asked.precision,
        accumulate_grad_batches=cli.asked.accumulate_grad_batches,
        gradient_clip_val=cli.asked.gradient_clip_val,
        callbacks=[_Stopwatch(times)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    trainer.fit(cli.model, datamodule=cli.datamodule)
    # The first step reads the bank for the first time.
    typical = statistics.median(times[1:] or times)
    return {"steps": len(times), "seconds_per_step": typical, "seconds": None if steps is None else steps * typical}


class _Stopwatch(pl.Callback):
    """The seconds from one optimiser step to the next."""

    def __init__(self, times: list[float]) -> None:
        self.times, self.last, self.taken = times, time.perf_counter(), 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.last = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step > self.taken:
            now, self.taken = time.perf_counter(), trainer.global_step
            self.times.append(now - self.last)
            self.last = now


def _show(result: Mapping[str, Any]) -> None:
    table = Table("task", "found", "images", "classes", Column("first problem", overflow="fold"))
    for task, row in result["tasks"].items():
        problem = row["problem"] or ""
        counts = (f"{row['images']:,}" if row["images"] else "", str(row["classes"] or ""))
        cells = (Text(printable(task)), "no" if problem else "yes", *counts, Text(printable(problem)))
        table.add_row(*cells, style="red" if problem else "")
    Console().print(table)
    if "memory" not in result:
        return
    steps, step = result["steps"], result["step"]
    write(
        f"{result['experts']} experts of {result['parameters']:,} parameters, {result['learned']:,} learn; "
        f"{'' if steps is None else f'{steps} '}steps of {step['images']} images ({step['graph']}) on "
        f"{result['processes']} process{'' if result['processes'] == 1 else 'es'}"
    )
    Console().print(_memory(result))
    if "probe" in result:
        probe = result["probe"]
        whole = "" if probe["seconds"] is None else f", {probe['seconds']:.0f} s of steps"
        write(f"{probe['seconds_per_step']:.3f} s a step on one device of this machine{whole}")
    for path, size in result["files"].items():
        write(f"would write {path}{'' if size is None else f' ({_size(size)})'}")


def _memory(result: Mapping[str, Any]) -> Table:
    where = "process" if result["device"] == "cpu" else "device"
    kinds, rows = list(result["memory"]), list(result["memory"].values())
    columns = [f"{kind} (chosen)" if kind == result["placement"] else kind for kind in kinds]
    table = Table(f"memory of each {where}", *(Column(name, justify="right") for name in columns))
    for key, name in _SHOWN.items():
        table.add_row(name, *(_size(row["device"][key]) for row in rows))
    for key, name in _HOST.items():
        table.add_row(name, *(_size(row["host"][key]) for row in rows))
    table.add_section()
    table.add_row(f"peak of each {where}", *(_size(row["total"]) for row in rows), style="bold")
    return table


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B" if count else ""
