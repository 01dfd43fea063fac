"""A bank of which each process holds a slice: it learns what the whole bank learns."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from conftest import TASKS, Toy, perturbed
from processes import guarded, launch, parts, texts
from torch import nn
from user_rule import ConcreteMask

import adaptive_merge as am
from adaptive_merge.runs.results import score

STEPS = 20
# On four processes one has no image of green at all, and all have other numbers of validation batches.
SIZES = {"red": 25, "green": 3, "blue": 16}
RECIPES = {
    "layer-wise, joint": (am.AdaMerging, {"accumulate": "joint"}, {}),
    "task-wise, per task": (am.AdaMerging, {"accumulate": "per_task", "granularity": "task"}, {}),
    "adamerging++": (am.AdaMergingPP, {"density": 0.5, "accumulate": "per_task", "lr": 0.01}, {}),
    "surgery": (am.Surgery, {"rank": 2, "lr": 0.01}, {}),
    "surgery and coefficients": (am.Surgery, {"rank": 2, "coefficients": am.LayerWise}, {}),
    "tinting++, shuffled": (am.TintingPP, {}, {"schedule": "shuffled"}),
    "tinting++, a block": (am.TintingPP, {"layer": "blocks.1.1.weight"}, {}),
    "a mask, joint": (am.AdaptiveMerge, {"coefficients": ConcreteMask, "accumulate": "joint", "lr": 0.01}, {}),
    "a mask, per task": (am.AdaptiveMerge, {"coefficients": ConcreteMask, "accumulate": "per_task", "lr": 0.01}, {}),
    "a spectral mask": (am.AdaptiveMerge, {"coefficients": partial(am.Spectral, keep=0.5, margin=0.02)}, {}),
    "a line, per task": (am.AdaptiveMerge, {"coefficients": am.DepthWise, "accumulate": "per_task"}, {}),
    "a concrete mask in turns": (
        am.AdaptiveMerge,
        {"coefficients": partial(am.ConcreteMask, "layer", mask_steps=5), "lr": 1e-3},
        {},
    ),
    "wemoe": (lambda *parts, **kind: am.AdaptiveMerge(*parts, adapters=[am.WEMoE(4)], lr=0.01, **kind), {}, {}),
    "e-wemoe, coefficients learn": (
        lambda *parts, **kind: am.AdaMerging(*parts, adapters=[am.EWEMoE(0.5, 4)], accumulate="joint", **kind),
        {},
        {},
    ),
    "twin": (
        lambda *parts, **kind: am.AdaptiveMerge(*parts, adapters=[am.Twin(0.5, 4)], objective=am.Stream(), **kind),
        {},
        {"share": "tasks"},
    ),
    # Of four processes one owns no task, and merges along with the others all the same.
    "tasks owned, joint": (am.AdaMerging, {"accumulate": "joint"}, {"share": "tasks"}),
    "tasks owned, surgery": (am.Surgery, {"rank": 2}, {"share": "tasks"}),
}
VALIDATED = ("adamerging++", "surgery", "tinting++, a block")


class Odd(Toy):
    """With 619 entries, which neither two nor four processes share out evenly."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(3))

    def forward(self, images):
        return super().forward(images) + torch.cat([self.shift, -self.shift])


class Held(pl.Callback):
    """Bytes of the bank that this process holds in a run."""

    def on_train_start(self, trainer, module):
        self.bytes = module.model.backbone.placement.held_bytes


def odd_parts(sizes=None):
    torch.manual_seed(0)
    toy = Odd()
    experts = {task: perturbed(toy.state_dict(), seed) for seed, task in enumerate(TASKS)}
    _, _, heads, images = parts(sizes)
    return am.TaskVectors.from_state_dicts(toy.state_dict(), experts), toy, heads, images


def run_all(rank, world, folder):
    kinds = ("resident", "sharded")
    torch.save(
        {bank: {name: learn(rank, world, bank, folder, name) for name in RECIPES} for bank in kinds},
        folder / f"{rank}.pt",
    )


def build(name, bank="resident"):
    """The recipe's module, its images and the settings of its stream."""
    vectors, toy, heads, images = odd_parts(SIZES)
    make, settings, stream = RECIPES[name]
    made = {key: value() if callable(value) else value for key, value in settings.items()}
    return make(vectors, toy, heads, bank=bank, **made), images, stream


def learn(rank, world, bank, folder, name):
    """Learn; some validate on the way, score the four views, and let the first process export alone."""
    module, images, stream = build(name, bank)
    held, data = Held(), am.TaskStream(images, 8, eval_batch_size=3, **stream)
    validation = {"val_check_interval": 9, "check_val_every_n_epoch": None} if name in VALIDATED else {}
    trainer = guarded(folder, world, [held], max_steps=STEPS, limit_val_batches=1.0 if validation else 0, **validation)
    trainer.fit(module, datamodule=data)
    learned = {key: value.detach().clone() for key, value in module.named_parameters()}
    found = {"learned": learned, "bytes": held.bytes}
    if validation:
        found["scores"] = score(trainer, module, data)
        found |= {"merged": module.merged_state_dict("red")} if rank == 0 else {}
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Number of processes → what each of them found, by the kind of its bank."""
    results = {}

    def of(world):
        if world not in results:
            folder = tmp_path_factory.mktemp(f"world{world}")
            codes = launch(world, run_all, world, folder, folder=folder)
            assert codes == [0] * world, texts(folder)
            results[world] = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]
        return results[world]

    return of


def largest_difference(ours, theirs):
    """Absolute up to 1, relative above: heads hold values near 16."""
    return max(((ours[key] - theirs[key]).abs() / theirs[key].abs().clamp_min(1)).max().item() for key in theirs)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("name", RECIPES)
def test_slices_learn_what_the_whole_bank_learns(found, name, world, record_property):
    ours, whole = (found(world)[0][bank][name]["learned"] for bank in ("sharded", "resident"))
    alone = found(1)[0]["resident"][name]["learned"]
    apart = largest_difference(ours, whole)
    record_property("difference", apart)
    assert apart <= 1e-6
    keys = [key for key in ours if key.startswith("model.backbone.coefficients.")]
    assert largest_difference({key: ours[key] for key in keys}, {key: alone[key] for key in keys}) <= 1e-6
    start = dict(build(name)[0].named_parameters())
    assert max((alone[key] - start[key]).abs().max().item() for key in alone) > 1e-4


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", RECIPES)
def test_processes_hold_the_same_bits(found, name, world):
    first, *others = (result["sharded"][name]["learned"] for result in found(world))
    for other in others:
        assert all(torch.equal(other[key], first[key]) for key in first)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", VALIDATED)
def test_all_score_the_same_and_the_first_process_exports_alone(found, name, world):
    whole = found(world)[0]["resident"][name]
    assert largest_difference(found(world)[0]["sharded"][name]["merged"], whole["merged"]) <= 1e-6
    for result in found(world):
        assert result["sharded"][name]["scores"] == whole["scores"]


@pytest.mark.parametrize("world", [2, 4])
def test_each_process_holds_its_part_of_the_bank(found, world):
    whole = found(1)[0]["resident"]["surgery"]["bytes"]
    columns = 619 // world + 619 % world
    for result in found(world):
        assert result["sharded"]["surgery"]["bytes"] == 4 * (len(TASKS) + 1) * columns
        assert result["sharded"]["surgery"]["bytes"] / whole == pytest.approx(1 / world, abs=0.01)
