"""Write configs/clip/: a folder per backbone and suite, with its suite.json and one short YAML per method.

    python scripts/make_clip_configs.py            # write the files
    python scripts/make_clip_configs.py --check    # only say whether they are what this script writes

Every file is a method's parts with the hyper-parameters it was published with. The second header line is a published
mean and the checkpoints it belongs to, where a log, a repository's table or a table printed again elsewhere gives one.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from adaptive_merge.suites.class_names import clip_task_names
from adaptive_merge.suites.clip_tasks import TEST_SIZES, layout_of

ROOT = Path(__file__).resolve().parent.parent / "configs" / "clip"
SUITES = {"8tasks": 8, "14tasks": 14, "20tasks": 20}


@dataclass(frozen=True)
class Backbone:
    """A CLIP tower: open_clip's architecture, the checkpoints' folder, entries of a published state dict."""

    title: str
    architecture: str
    entries: int  # text leftovers included: what the published TIES counts its density over
    surgery_v2_rank: int


BACKBONES = {
    "vit_b_32": Backbone("ViT-B/32", "ViT-B-32-quickgelu", 113_448_705, 16),
    "vit_b_16": Backbone("ViT-B/16", "ViT-B-16-quickgelu", 111_792_129, 16),
    "vit_l_14": Backbone("ViT-L/14", "ViT-L-14-quickgelu", 342_562_049, 4),
}
ORIGINAL = "task_vectors checkpoints"
HF = "Hugging Face (tanganke) checkpoints"
SEVEN = f"{ORIGINAL}; the published code leaves DTD out of the average"
# (method, backbone), eight tasks → mean top-1 in % and the family of checkpoints.
PUBLISHED = {
    ("weight_averaging", "vit_b_32"): (65.8, ORIGINAL),
    ("task_arithmetic", "vit_b_32"): (69.1, ORIGINAL),
    ("ties", "vit_b_32"): (72.4, ORIGINAL),
    ("adamerging_task", "vit_b_32"): (71.1, ORIGINAL),
    ("adamerging_pp_task", "vit_b_32"): (73.8, ORIGINAL),
    ("adamerging", "vit_b_32"): (80.2, ORIGINAL),
    ("adamerging_pp", "vit_b_32"): (81.1, ORIGINAL),
    ("surgery_avg", "vit_b_32"): (80.0, SEVEN),
    ("surgery_ta", "vit_b_32"): (80.9, ORIGINAL),
    ("surgery_ties", "vit_b_32"): (83.2, ORIGINAL),
    ("surgery_adamerging", "vit_b_32"): (86.1, ORIGINAL),
    ("weight_averaging", "vit_b_16"): (72.3, HF),
    ("task_arithmetic", "vit_b_16"): (77.1, HF),
    ("ties", "vit_b_16"): (77.5, HF),
    ("adamerging", "vit_b_16"): (85.0, HF),
    ("surgery_avg", "vit_b_16"): (82.7, SEVEN),
    ("surgery_ta", "vit_b_16"): (85.0, ORIGINAL),
    ("surgery_ties", "vit_b_16"): (86.1, ORIGINAL),
    ("surgery_adamerging", "vit_b_16"): (88.9, ORIGINAL),
    ("weight_averaging", "vit_l_14"): (79.6, ORIGINAL),
    ("task_arithmetic", "vit_l_14"): (84.5, ORIGINAL),
    ("ties", "vit_l_14"): (86.0, ORIGINAL),
    ("adamerging_task", "vit_l_14"): (80.1, HF),
    ("adamerging", "vit_l_14"): (90.8, ORIGINAL),
    ("adamerging_pp", "vit_l_14"): (91.0, ORIGINAL),
    ("surgery_avg", "vit_l_14"): (86.0, SEVEN),
    ("surgery_ta", "vit_l_14"): (89.0, ORIGINAL),
    ("surgery_ties", "vit_l_14"): (89.3, ORIGINAL),
    ("surgery_adamerging", "vit_l_14"): (92.3, ORIGINAL),
}
# The only published means beyond eight tasks.
SYMERGE = {"8tasks": 94.1, "14tasks": 92.8, "20tasks": 93.2}


@dataclass(frozen=True)
class Method:
    """One method. Texts may hold {init} and {scale} (0.3; 0.1 from 14 tasks on), {entries}, {rank} and {steps}.

    Args:
        title: what the first header line says.
        model: lines of `model:`.
        steps: optimiser steps; for one task per step, rounds.
        images: of each task in a step; None: the method takes no step.
        data: further lines of `data:`.
        shuffled: one task a step, so that a round takes as many steps as there are tasks.
    """

    title: str
    model: tuple[str, ...]
    steps: int = 0
    images: int | None = None
    data: tuple[str, ...] = field(default=())
    shuffled: bool = False


FIXED = "coefficients: {{class_path: Fixed, init_args: {{init: {init}}}}}"
AVERAGE = "coefficients: {{class_path: Fixed, init_args: {{init: average}}}}"
LAYER = "coefficients: {{class_path: LayerWise, init_args: {{init: {init}, bounds: clamp}}}}"
TASK = "coefficients: {{class_path: TaskWise, init_args: {{init: {init}, bounds: clamp}}}}"
TIES = "transforms: [{{class_path: Ties, init_args: {{density: 0.2, counted_over: {entries}}}}}]"
SURGERY = "adapters: [{{class_path: FeatureSurgery, init_args: {{rank: 16}}}}]"
L1 = "objective: {{class_path: FeatureDistance, init_args: {{kind: l1}}}}"
HEADS = "adapters: [{{class_path: Tint, init_args: {{layer: head}}}}]"
ENTROPY = "objective: Entropy"
LABELS = "objective: PseudoLabel"
CONFIDENT = "objective: {{class_path: PseudoLabel, init_args: {{confident: true}}}}"
ADAM, FAST = "Adam 1e-3", "Adam 1e-2"

METHODS = {
    "weight_averaging": Method("Weight averaging: every coefficient 1/T.", (AVERAGE,)),
    "task_arithmetic": Method("Task arithmetic (Ilharco et al., ICLR 2023), scale {init}.", (FIXED,)),
    "ties": Method("TIES (Yadav et al., NeurIPS 2023): density 0.2, disjoint sum, scale {init}.", (TIES, FIXED)),
    "adamerging_task": Method(
        f"Task-wise AdaMerging (Yang et al., ICLR 2024): {ADAM}, from {{init}}, clamped, entropy.",
        (TASK, ENTROPY),
        500,
        32,
    ),
    "adamerging": Method(
        f"Layer-wise AdaMerging (Yang et al., ICLR 2024): {ADAM}, from {{init}}, clamped, entropy.",
        (LAYER, ENTROPY),
        500,
        32,
    ),
    "adamerging_pp_task": Method(
        f"Task-wise AdaMerging++ (Yang et al., ICLR 2024), over TIES task vectors: {ADAM}, from {{init}}, clamped.",
        (TIES, TASK, ENTROPY),
        500,
        32,
    ),
    "adamerging_pp": Method(
        f"Layer-wise AdaMerging++ (Yang et al., ICLR 2024), over TIES task vectors: {ADAM}, from {{init}}, clamped.",
        (TIES, LAYER, ENTROPY),
        500,
        32,
    ),
    "surgery_avg": Method(
        f"Representation Surgery, rank 16 (Yang et al., ICML 2024), on weight averaging: {ADAM}, L1 to the experts.",
        (AVERAGE, SURGERY, L1),
        1000,
        16,
    ),
    "surgery_ta": Method(
        f"Representation Surgery, rank 16 (Yang et al., ICML 2024), on task arithmetic at {{init}}: {ADAM}, L1.",
        (FIXED, SURGERY, L1),
        1000,
        16,
    ),
    "surgery_ties": Method(
        f"Representation Surgery, rank 16 (Yang et al., ICML 2024), on TIES at {{init}}: {ADAM}, L1 to the experts.",
        (TIES, FIXED, SURGERY, L1),
        1000,
        16,
    ),
    "surgery_adamerging": Method(
        f"Representation Surgery, rank 16 (Yang et al., ICML 2024), on layer-wise AdaMerging, trained first: {ADAM}.",
        (
            LAYER,
            SURGERY,
            "stages:",
            "  - {{steps: 500, learn: coefficients, objective: Entropy}}",
            "  - {{steps: 1000, learn: adapters, objective: {{class_path: FeatureDistance, init_args: {{kind: l1}}}}}}",
        ),
        1500,
        32,
    ),
    "surgery_v2": Method(
        f"SurgeryV2, rank {{rank}} (Yang et al., 2024), on task arithmetic at {{init}}: {ADAM}, L1 of mean tokens.",
        (
            FIXED,
            "adapters: [{{class_path: BlockSurgery, init_args: {{rank: {rank}}}}}]",
            "objective: {{class_path: FeatureDistance, init_args: {{kind: l1, blocks: true}}}}",
        ),
        1000,
        16,
    ),
    "tinting": Method(
        f"Model Tinting (Jung et al., 2024): coefficients from {{init}} and task heads, {FAST}, the experts' labels.",
        (LAYER, HEADS, LABELS, "lr: 0.01"),
        500,
        32,
        shuffled=True,
    ),
    "tinting_pp": Method(
        f"Tinting++ (Jung et al., 2024), confidence filter: coefficients from {{init}} and task heads, {FAST}.",
        (LAYER, HEADS, CONFIDENT, "lr: 0.01"),
        500,
        32,
        shuffled=True,
    ),
    "symerge": Method(
        f"SyMerge (Jung et al., ICML 2026), Tinting++ over whole passes: coefficients from {{init}} and heads, {FAST}.",
        (LAYER, HEADS, CONFIDENT, "lr: 0.01"),
        500,
        32,
        ("sampling: epoch",),
        shuffled=True,
    ),
}


README = """# CLIP suites

Three backbones, suites of 8, 14 and 20 tasks, one file per method. `python scripts/make_clip_configs.py` writes this
folder; change the script, not the files.

```
export CLIP_CHECKPOINTS=~/checkpoints CLIP_DATA=~/data
adaptive-merge data check --config configs/clip/vit_b_32/8tasks/adamerging.yaml --decode
adaptive-merge fit --config configs/clip/vit_b_32/8tasks/adamerging.yaml
adaptive-merge export runs/vit_b_32-8tasks-adamerging --format open_clip --output adapted --verify
```

`suite.json` of each folder says where the weights are: `$CLIP_CHECKPOINTS/ViT-B-32/zeroshot.pt`,
`…/<task>/finetuned.pt` and `…/head_<task>.pt`, as the task_vectors repository lays them out. Copy it to use other
places or formats: every path may be a state dict, a whole pickled model (read without running it), a Hugging Face or
open_clip folder, or `hf-hub:<org>/<name>`. Paths are relative to the folder of `suite.json`. Without `heads`, zero-shot
heads are made from the text tower of `text` (a full CLIP). Any folder of class folders is a task: name it under
`tasks` and give its place under `folders`. All keys are described in `adaptive_merge/suites/clip_suite.py`.

Nothing is downloaded. Each data set is the test split that the field scores:

"""


def published(method: str, backbone: str, suite: str) -> str:
    """The second header line."""
    if (method, backbone) == ("symerge", "vit_l_14"):
        return f"Published on ViT-L/14, {SUITES[suite]} tasks, the authors' checkpoints: {SYMERGE[suite]} %."
    found = PUBLISHED.get((method, backbone)) if suite == "8tasks" else None
    if found is None:
        return f"No published mean on {BACKBONES[backbone].title} and {SUITES[suite]} tasks is known to us."
    return f"Published on {BACKBONES[backbone].title}, eight tasks: {found[0]} % ({found[1]})."


def config(method: str, backbone: str, suite: str) -> str:
    """The YAML of one method."""
    parts, tasks = METHODS[method], SUITES[suite]
    facts = {
        "init": 0.3 if tasks == 8 else 0.1,
        "entries": BACKBONES[backbone].entries,
        "rank": BACKBONES[backbone].surgery_v2_rank,
    }
    steps = parts.steps * (tasks if parts.shuffled else 1)
    data = [f"images_per_task: {parts.images}"] if parts.images else []
    data += ["schedule: shuffled"] * parts.shuffled + list(parts.data)
    lines = [
        f"# {parts.title.format(**facts)}",
        f"# {published(method, backbone, suite)}",
        f"suite: {{name: configs/clip/{backbone}/{suite}}}",
        f"run: {{name: {backbone}-{suite}-{method}}}",
        "model:",
        f"  recipe: {method}",
        *(f"  {line.format(**facts)}" for line in parts.model),
        *(["data:"] if data else []),
        *(f"  {line}" for line in data),
        "trainer:",
        f"  max_steps: {steps}",
    ]
    return "\n".join(lines) + "\n"


def suite_json(backbone: str, suite: str) -> str:
    """The suite that the configurations of a folder share, over the published checkpoints' layout."""
    tower = BACKBONES[backbone].architecture
    place = f"$CLIP_CHECKPOINTS/{tower.removesuffix('-quickgelu')}"
    content = {
        "kind": "clip",
        "name": f"{backbone}-{suite}",
        "architecture": tower,
        "pretrained": f"{place}/zeroshot.pt",
        "experts": f"{place}/{{task}}/finetuned.pt",
        "heads": f"{place}/head_{{task}}.pt",
        "data": "$CLIP_DATA",
        "cache": "$CLIP_DATA/adaptive_merge",
        "tasks": list(clip_task_names()[: SUITES[suite]]),
    }
    return json.dumps(content, indent=2) + "\n"


def readme() -> str:
    """What has to be on disk for these configurations."""
    rows = ["| task | test images | files under `$CLIP_DATA` |", "|---|---:|---|"]
    for task in clip_task_names():
        sizes = " or ".join(f"{size:,}" for size in TEST_SIZES[task])
        rows.append(f"| {task} | {sizes} | {layout_of(task).replace('|', '/')} |")
    return README + "\n".join(rows) + "\n"


def files() -> dict[Path, str]:
    """Path → content of everything under configs/clip/."""
    found = {ROOT / "README.md": readme()}
    for backbone in BACKBONES:
        for suite in SUITES:
            folder = ROOT / backbone / suite
            found[folder / "suite.json"] = suite_json(backbone, suite)
            found |= {folder / f"{method}.yaml": config(method, backbone, suite) for method in METHODS}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    wrong = [path for path, content in files().items() if not path.is_file() or path.read_text() != content]
    if not check:
        for path in wrong:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(files()[path])
    for path in wrong:
        print(f"{'differs' if check else 'wrote'}: {path.relative_to(ROOT.parent.parent)}")
    return int(check and bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
