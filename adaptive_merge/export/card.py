"""The model card of an export: method, tasks, accuracies, hashes and commands, from a template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any, Final

from adaptive_merge import __version__
from adaptive_merge.adapters.heads import Head
from adaptive_merge.engine.identity import describe
from adaptive_merge.engine.views import VIEWS, percent
from adaptive_merge.export.formats import OPENAI_MEAN, OPENAI_STD, Job
from adaptive_merge.export.tower import image_size
from adaptive_merge.files import save_text
from adaptive_merge.runs.shown import footing, uses_labels
from adaptive_merge.weights.manifest import sha256_of_files

__all__ = ["plain", "write_card"]

_LIBRARY: Final = {
    "open_clip": "open_clip",
    "hf": "transformers",
    "onnx": "onnx",
    "safetensors": "safetensors",
    "module": "adaptive_merge",
}
_LOAD: Final = {
    "open_clip": 'import open_clip\n\nmodel, preprocess = open_clip.create_model_from_pretrained("local-dir:FOLDER")\n'
    "features = model.encode_image(images)",
    "hf": "from transformers import CLIPVisionModelWithProjection\n\n"
    'model = CLIPVisionModelWithProjection.from_pretrained("FOLDER")\nfeatures = model(images).image_embeds',
    "onnx": 'import onnxruntime\n\nsession = onnxruntime.InferenceSession("FOLDER/model.onnx")\n'
    '(output,) = session.run(None, {"images": images})  # float32 [batch, 3, height, width]',
    "safetensors": "from safetensors.torch import load_file\n\n"
    'backbone.load_state_dict(load_file("FOLDER/model.safetensors"))\nfeatures = backbone(images)',
    "module": 'import adaptive_merge as am\n\nmodel = am.load_module("FOLDER")\n'
    "tasks, classes = model.predict(images)  # or model.predict(images, task)",
}

_LOGITS: Final = "Logits of {} are `{}` with its tensors of `heads.safetensors`."
_IN_GRAPH: Final = "The graph ends in the task's logits; its head and all that the task has of its own are inside."


_MEASURED: Final = {
    "accuracy": "Accuracies are top-1 in % on test images.",
    "agreement": "Without labels: in % of the test images, agreement with the task's expert.",
}


def write_card(
    job: Job,
    format: str,
    results: Mapping[str, Any] | None,
    verified: str,
    command: str,
    base_models: Sequence[str] = (),
) -> None:
    """Write `README.md` beside the model.

    Args:
        results: the run's `results.json`, for the accuracies; None leaves them out.
        verified: what the comparison found.
        command: how the folder was made.
        base_models: names on the hub of the models that were merged.
    """
    module, backbone = job.module, job.module.model.backbone
    height, width = image_size(backbone)
    text = Template(resources.files("adaptive_merge.export").joinpath("card.md").read_text(encoding="utf-8"))
    method = module.method
    adapters = [f"adapter {number}" for number, _ in enumerate(module.model.adapters, 1)]
    numbers = sum(value.numel() for value in module.coefficients.parameters())
    content = text.substitute(
        library=_LIBRARY[format],
        base_models=_base_models(base_models),
        measured=_MEASURED[(results or {}).get("measure", "accuracy")],
        title=f"{plain(module.recipe)}: {len(module.tasks)} experts in one model",
        summary=f"A merge of {len(module.tasks)} fine-tuned image encoders, adapted on unlabelled test images.",
        protocol=_protocol(results),
        recipe=plain(module.recipe),
        coefficients=plain(f"{describe(method, 'coefficients')}, {numbers:,} numbers"),
        adapters=plain(", ".join(describe(method, name) for name in adapters)) or "none",
        scope="all tasks (shared merge)" if job.task is None else f"task {plain(job.task)}",
        format=format,
        images=32,
        verified=verified,
        tasks=_tasks(module.tasks, results),
        files=_files(job.folder),
        notes=_notes(job, format, [plain(method[name]) for name in adapters]),
        load=_LOAD[format],
        size=height if height == width else f"{height} x {width}",
        mean=list(getattr(backbone.skeleton, "image_mean", None) or OPENAI_MEAN),
        std=list(getattr(backbone.skeleton, "image_std", None) or OPENAI_STD),
        logits=_IN_GRAPH if format == "onnx" and job.task is not None else _logits(job.folded.heads),
        experts=_experts(module.merged_fingerprints),
        version=__version__,
        command=command,
    )
    save_text(job.folder / "README.md", content)


def _base_models(names: Sequence[str]) -> str:
    """The card's metadata by which the hub draws the family of a merge; a line each."""
    if not names:
        return ""
    return "".join(["base_model:\n", *(f"- {name}\n" for name in names), "base_model_relation: merge\n"])


def _tasks(tasks: tuple[str, ...], results: Mapping[str, Any] | None) -> str:
    if results is None:
        return "\n".join(f"- {plain(task)}" for task in tasks)
    rows = ["| task | images | pre-trained | individual | merged | adapted |", "|---|---:|---:|---:|---:|---:|"]
    unseen = results.get("unseen", {"tasks": []})
    for task, row in results["tasks"].items():
        name = f"{plain(task)} (not merged)" if task in unseen["tasks"] else plain(task)
        # Of a single pass the exported weights are those at its end.
        final = {"adapted": results["online"]["final"][task]} if "online" in results else {}
        rows.append(f"| {name} | {row['n']:,} | {_percent(row | final)} |")
    average = results["average"]
    if "online" in results:
        average = average | {"adapted": sum(results["online"]["final"][task] for task in tasks) / len(tasks)}
    return "\n".join([*rows, f"| **average of the merged tasks** | | {_percent(average)} |"])


def _protocol(results: Mapping[str, Any] | None) -> str:
    if results is None or "protocol" not in results:
        return ""
    name = results["protocol"]["name"]
    basis = footing(results).removesuffix(", each predicted before it was used")
    passed = " The accuracies are those of the model at the end of the pass." if name == "online" else ""
    chosen = " ORACLE: labels chose the step that was kept." if uses_labels(results) else ""
    return f"{basis[0].upper()}{basis[1:]}.{passed}{chosen}"


def _percent(row: Mapping[str, float]) -> str:
    return " | ".join(f"{percent(row[view]):.1f}" for view in VIEWS)


def _files(folder: Path) -> str:
    lines = ["| file | bytes | sha256 |", "|---|---:|---|"]
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != "README.md":
            lines.append(f"| `{path.name}` | {path.stat().st_size:,} | `{sha256_of_files([path])}` |")
    return "\n".join(lines)


def _notes(job: Job, format: str, kinds: list[str]) -> str:
    notes = []
    if job.task is None and kinds:
        notes.append(
            f"What each task has of its own ({', '.join(kinds)}) is in `adapters.safetensors` and not in the model; "
            "`load_adapters` puts it back, or export with `--task`."
        )
    if format == "open_clip" and job.text is None:
        notes.append(
            "The text tower is a placeholder of zeros, so that open_clip loads the folder: use `encode_image` and "
            "`heads.safetensors`, or export with `--text` and the full CLIP."
        )
    return "\n\n".join(notes)


def _logits(heads: Mapping[str, Head]) -> str:
    formulas = {task: head.formula for task, head in heads.items()}
    if len(set(formulas.values())) == 1:
        return _LOGITS.format("a task", *set(formulas.values()))
    return "\n".join(f"- {_LOGITS.format(plain(task), formula)}" for task, formula in formulas.items())


def _experts(fingerprints: Mapping[str, str]) -> str:
    rows = ["| weights | sha256 (names, shapes and values) |", "|---|---|"]
    return "\n".join([*rows, *(f"| {plain(name)} | `{digest}` |" for name, digest in fingerprints.items())])


def plain(text: str) -> str:
    """A name that cannot break a table or smuggle in markup."""
    return "".join("_" if letter in "|<>`\n\r\\[]" else letter for letter in text)
