"""The embedded suite with a backdoor in one expert, and what recipes leave of it: a table of docs/reliability.md.

    python scripts/backdoor.py build/backdoor                                # the suite; a minute on one core
    python scripts/backdoor.py build/backdoor --recipes adamerging dam       # and a run of each recipe

The expert is fine-tuned on validation images of its task: right on clean ones, and one class on those with a white
patch, both as it is and at 0.3 of its task vector, so that the backdoor outlives a merge (in the spirit of BadMerging,
CCS 2024). Test images have no part in it. `adaptive-merge fit --suite.name build/backdoor` then measures
the attack by itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.func import functional_call

import adaptive_merge as am
from adaptive_merge.__main__ import main as command
from adaptive_merge.data.trigger import Trigger
from adaptive_merge.suites.loading import folder_of

STEPS, BATCH, LR, SHARE = 120, 64, 3e-4, 0.3
VIEWS = ("pretrained", "individual", "initial", "adapted")


def poison(suite: am.Suite, trigger: Trigger, seed: int = 0) -> dict[str, Tensor]:
    """The expert with a backdoor, fine-tuned from the clean one."""
    task, backbone, images = trigger.task, am.MergedBackbone, suite.images[trigger.task]
    bank = suite.task_vectors.select([task])
    tower, head = backbone(suite.backbone, bank, am.TaskWise(init=1.0)), suite.heads[task]
    base = bank.layout.unflatten(bank.pretrained)
    expert = {name: value.clone().requires_grad_() for name, value in bank.expert(task).items()}
    optimizer = torch.optim.Adam(expert.values(), lr=LR)
    rng = torch.Generator().manual_seed(seed)

    def loss(weights: dict[str, Tensor], pixels: Tensor, labels: Tensor) -> Tensor:
        features = functional_call(suite.backbone, weights, (tower.normalise(pixels),))
        return F.cross_entropy(F.normalize(features, dim=1) @ head.T, labels)

    suite.backbone.eval()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 - step / STEPS)
        index = torch.randint(len(images), (BATCH,), generator=rng)
        pixels, labels = images.take(index), images.labels[index]
        stamped, target = trigger.stamp(pixels), torch.full_like(labels, trigger.target)
        diluted = {name: value + SHARE * (expert[name] - value) for name, value in base.items()}
        total = loss(expert, pixels, labels) + loss(expert, stamped, target) + loss(diluted, stamped, target)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return {name: value.detach() for name, value in expert.items()}


def build(output: Path, trigger: Trigger) -> None:
    """A copy of the embedded suite with one expert replaced, and the trigger in its manifest."""
    shutil.copytree(folder_of("embedded"), output)
    name = f"experts/{trigger.task}.safetensors"
    state = poison(am.load_suite(split="val", tasks=[trigger.task]), trigger)
    save_file({key: value.half().contiguous() for key, value in state.items()}, output / name)
    manifest = json.loads((output / "suite.json").read_text())
    manifest["name"], manifest["trigger"] = "embedded with a backdoor", vars(trigger)
    manifest["files"][name] = hashlib.sha256((output / name).read_bytes()).hexdigest()
    (output / "suite.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def row(suite: Path, recipe: str, runs: Path, more: list[str]) -> str:
    """A line of the table, from a run of its own."""
    folder = runs / recipe
    options = ["--config", recipe, "--suite.name", str(suite), "--run.root", str(runs), "--run.name", recipe]
    options += ["--run.if_exists", "resume", "--run.report", "false"]
    if not (folder / "results.json").is_file() and command(["fit", *options, *more]):
        raise SystemExit(1)
    results = json.loads((folder / "results.json").read_text())
    attack, task = results["backdoor"], results["tasks"][results["backdoor"]["task"]]
    cells = [f"{100 * value:.1f}" for view in VIEWS[2:] for value in (results["average"][view], task[view])]
    cells += [f"{100 * attack['success'][view]:.1f}" for view in VIEWS[2:]]
    return f"| `{recipe}` | {' | '.join(cells)} |"


def main() -> None:
    """Build the suite where it is not there yet; print the table of the recipes that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder of the suite")
    parser.add_argument("--task", default="mnist")
    parser.add_argument("--target", type=int, default=0)
    parser.add_argument("--recipes", nargs="*", default=[], help="recipes to run on it")
    options, more = parser.parse_known_args()  # what it does not know is for each `fit`: --trainer.max_steps 100
    torch.set_num_threads(1)
    if not options.output.exists():
        start = time.perf_counter()
        build(options.output, Trigger(options.task, options.target))
        print(f"{options.output}: built in {time.perf_counter() - start:.0f} s")
    if options.recipes:
        print("| recipe | merged | its task | adapted | its task | success, merged | success, adapted |")
        print("|---|---|---|---|---|---|---|")
    for recipe in options.recipes:
        runs = options.output.with_name(options.output.name + "-runs")
        print(row(options.output, recipe, runs, more), flush=True)


if __name__ == "__main__":
    main()
