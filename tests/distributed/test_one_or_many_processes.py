"""One process or several: the same answer, and ranks that hold the same bits."""

import pytest
import pytorch_lightning as pl
import torch
from processes import guarded, launch, parts, texts

import adaptive_merge as am
from adaptive_merge.callbacks.safe.faults import FaultGuard, NotFinite
from adaptive_merge.callbacks.safe.rank_check import RankAgreement, RanksDisagree

STEPS = 20
SIZES = {"red": 1003, "green": 3, "blue": 40}
RECIPES = {
    "adamerging, joint": (am.AdaMerging, {"accumulate": "joint"}, {}),
    "adamerging, per task": (am.AdaMerging, {"accumulate": "per_task", "lr": 0.01}, {}),
    "surgery": (am.Surgery, {"rank": 2, "lr": 0.01}, {}),
    "tinting++, shuffled": (am.TintingPP, {}, {"schedule": "shuffled"}),
    "tinting++, head and blocks": (am.TintingPP, {"layer": "blocks.1.1.weight"}, {}),
    # Three tasks do not divide by two processes, and of four one has none.
    "adamerging, joint, tasks owned": (am.AdaMerging, {"accumulate": "joint"}, {"share": "tasks"}),
    "adamerging, per task, tasks owned": (am.AdaMerging, {"accumulate": "per_task"}, {"share": "tasks"}),
    "surgery, tasks owned": (am.Surgery, {"rank": 2, "lr": 0.01}, {"share": "tasks"}),
    "tinting++, tasks owned": (am.TintingPP, {}, {"share": "tasks"}),
    # Shares of a batch that are not equal, some of them empty.
    "adamerging, six images": (am.AdaMerging, {"lr": 0.01}, {"images_per_task": 6}),
    "tinting++, one image, shuffled": (am.TintingPP, {}, {"images_per_task": 1, "schedule": "shuffled"}),
    "surgery, online": (am.Surgery, {"rank": 2, "lr": 0.01}, {"images_per_task": 5, "protocol": am.Online()}),
    "tinting++, online": (am.TintingPP, {}, {"images_per_task": 5, "protocol": am.Online()}),
    "adversarial, six images": (
        am.AdaMerging,
        {"objective": am.Adversarial(weight=0.5, lr=0.01), "lr": 0.01},
        {"images_per_task": 6},
    ),
    "reliable and diverse entropy": (
        am.AdaMerging,
        {"objective": am.Entropy(diversity=0.5, reliable=0.9), "lr": 0.01},
        {"images_per_task": 6},
    ),
}


class Spy(pl.Callback):
    """The names under which something is logged, step by step."""

    def __init__(self):
        self.keys = []

    def on_train_batch_end(self, trainer, module, *_):
        self.keys.append(list(trainer.callback_metrics))


class Spoil(pl.Callback):
    """Make the loss of one process NaN in some steps."""

    def __init__(self, rank, steps):
        self.rank, self.steps = rank, steps

    def on_train_start(self, trainer, module):
        step = module.training_step

        def spoiled(batch, batch_idx):
            hit = trainer.global_rank == self.rank and trainer.global_step in self.steps
            return step(batch, batch_idx) * (float("nan") if hit else 1.0)

        module.training_step = spoiled

    def on_train_end(self, trainer, module):
        del module.training_step


class Picky(am.Entropy):
    """Keeps no image of any task in the steps 3 and 4."""

    def __init__(self):
        super().__init__()
        self.filters, self.calls = True, 0

    def keep(self, prediction, expert):
        self.calls += 1
        return super().keep(prediction, expert) & ((self.calls - 1) // 3 not in (3, 4))


class Nudge(pl.Callback):
    """Move one process's coefficients by a hair after step 3."""

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_rank == 1 and trainer.global_step == 3:
            with torch.no_grad():
                module.coefficients.values[0, 0] += 1e-6


def run_all(rank, world, folder):
    """Everything that is compared, in one launch."""
    found = {name: learn(world, folder, name) for name in RECIPES}
    found["nan"] = skip(world, folder, [Spoil(world - 1, {3, 4})])
    found["nothing kept"] = skip(world, folder, [], objective=Picky())
    found["in a row"] = error_of(world, folder, NotFinite, [Spoil(world - 1, range(2, 99)), FaultGuard(patience=2)])
    found["accuracy"] = accuracy(world, folder)
    found["no step"] = ledger_of_no_step(world, folder)
    if world > 1:
        found["planted"] = error_of(world, folder, RanksDisagree, [Nudge(), RankAgreement(every=5)])
    torch.save(found, folder / f"{rank}.pt")


def learn(world, folder, name):
    bank, toy, heads, images = parts()
    make, settings, stream = RECIPES[name]
    module, spy = make(bank, toy, heads, **settings), Spy()
    objective, kept = module.stages[0].objective, []
    keep = objective.keep
    objective.keep = lambda *predictions: kept.append(keep(*predictions).tolist()) or keep(*predictions)
    ledger = am.Ledger(str(folder))
    trainer = guarded(folder, world, [spy, ledger], max_steps=STEPS)
    data = am.TaskStream(images, **{"images_per_task": 8} | stream)
    trainer.fit(module, datamodule=data)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    with module.viewing("adapted"):
        trainer.validate(module, datamodule=data, verbose=False)
    scores = {key: float(value) for key, value in trainer.callback_metrics.items()}
    return {"state": state, "keys": spy.keys, "kept": kept, "rows": ledger.read(), "scores": scores}


def skip(world, folder, callbacks, **settings):
    bank, toy, heads, images = parts()
    module, guard = am.AdaMerging(bank, toy, heads, lr=0.05, accumulate="per_task", **settings), FaultGuard()
    trainer = guarded(folder, world, [*callbacks, guard], max_steps=8)
    trainer.fit(module, datamodule=am.TaskStream(images, 8))
    moments = trainer.optimizers[0].state_dict()["state"][0]
    return {"state": module.state_dict(), "taken": int(moments["step"]), "skipped": guard.skipped}


def error_of(world, folder, kind, callbacks):
    bank, toy, heads, images = parts()
    trainer = guarded(folder, world, callbacks, max_steps=STEPS)
    try:
        trainer.fit(am.AdaMerging(bank, toy, heads), datamodule=am.TaskStream(images, 8))
    except kind as error:
        return str(error), trainer.global_step, error.exit_code
    return None


def accuracy(world, folder):
    bank, toy, heads, images = parts(SIZES)
    module = am.AdaMerging(bank, toy, heads)
    trainer = guarded(folder, world)
    trainer.validate(module, datamodule=am.TaskStream(images, eval_batch_size=100), verbose=False)
    return {key: float(value) for key, value in trainer.callback_metrics.items() if key.endswith("accuracy")}


def ledger_of_no_step(world, folder):
    bank, toy, heads, images = parts()
    module, ledger, data = am.TaskArithmetic(bank, toy, heads), am.Ledger(str(folder)), am.TaskStream(images)
    trainer = guarded(folder, world, [ledger], max_steps=0)
    trainer.fit(module, datamodule=data)
    trainer.validate(module, datamodule=data, verbose=False)
    return ledger.read()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Number of processes → what each of them found."""
    results = {}
    for world in (1, 2, 4):
        folder = tmp_path_factory.mktemp(f"world{world}")
        codes = launch(world, run_all, world, folder, folder=folder)
        assert codes == [0] * world, texts(folder)
        results[world] = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]
    return results


def largest_difference(ours, theirs):
    """Of two states: absolute up to 1, relative above, where float32 has no finer steps (heads hold values near 16)."""
    return max(((ours[key] - theirs[key]).abs() / theirs[key].abs().clamp_min(1)).max().item() for key in theirs)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", RECIPES)
def test_many_processes_learn_what_one_learns(found, name, world, record_property):
    alone = found[1][0][name]["state"]
    apart = largest_difference(found[world][0][name]["state"], alone)
    record_property("difference", apart)
    assert apart <= 1e-6
    start = RECIPES[name][0](*parts()[:3], **RECIPES[name][1]).state_dict()
    assert largest_difference(start, alone) > 1e-4


@pytest.mark.parametrize("world", [2, 4])
def test_the_filter_keeps_other_numbers_of_images_on_other_processes(found, world):
    counts = [[sum(kept) for kept in result["tinting++, shuffled"]["kept"]] for result in found[world]]
    assert any(len(set(step)) > 1 for step in zip(*counts))


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", RECIPES)
def test_processes_hold_the_same_bits_and_log_the_same_keys(found, name, world):
    first, *others = (result[name] for result in found[world])
    for other in others:
        assert largest_difference(other["state"], first["state"]) == 0.0
        assert other["keys"] == first["keys"]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", RECIPES)
def test_all_processes_together_keep_one_ledger(found, name, world):
    alone = found[1][0][name]["rows"]
    for result in found[world]:
        for task, rows in result[name]["rows"].items():
            assert all(torch.equal(row, alone[task][kind]) for kind, row in rows.items())


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_run_of_no_step_has_scored_all_images(found, world):
    for result in found[world]:
        for rows in result["no step"].values():
            assert rows["scored"].all() and (rows["final"] >= 0).all() and not rows["adapted"].any()


@pytest.mark.parametrize("world", [2, 4])
def test_criteria_and_calibration_are_of_all_images(found, world):
    alone = found[1][0]["adamerging, joint"]["scores"]
    assert {"adapted/red/ece", "adapted/red/agreement", "adapted/red/js"} <= alone.keys()
    for result in found[world]:
        assert result["adamerging, joint"]["scores"] == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("world", [2, 4])
def test_a_planted_difference_ends_the_run_at_the_next_check(found, world):
    for result in found[world]:
        message, step, code = result["planted"]
        assert (step, code) == (5, 4)
        assert "process 1 differs from process 0 in 'model.backbone.coefficients.values'" in message


@pytest.mark.parametrize("world", [1, 2, 4])
def test_nan_on_one_process_skips_the_step_on_all(found, world):
    for result in found[world]:
        assert (result["nan"]["taken"], result["nan"]["skipped"]) == (6, 2)
        assert largest_difference(result["nan"]["state"], found[world][0]["nan"]["state"]) == 0.0
        assert largest_difference(result["nan"]["state"], found[1][0]["nan"]["state"]) <= 1e-6


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_step_that_keeps_no_image_anywhere_changes_nothing(found, world):
    for result in found[world]:
        assert (result["nothing kept"]["taken"], result["nothing kept"]["skipped"]) == (6, 0)
        # The same steps are left out as where they were spoiled, so the same is learned.
        assert largest_difference(result["nothing kept"]["state"], found[1][0]["nan"]["state"]) <= 1e-6


@pytest.mark.parametrize("world", [1, 2, 4])
def test_nan_again_and_again_ends_the_run_on_all(found, world):
    for result in found[world]:
        message, step, code = result["in a row"]
        assert "3 steps in a row" in message and code == 4


@pytest.mark.parametrize("world", [2, 4])
def test_each_image_is_scored_once(found, world):
    alone = found[1][0]["accuracy"]
    assert alone["adapted/red/accuracy"] * 1003 == pytest.approx(round(alone["adapted/red/accuracy"] * 1003), abs=1e-3)
    for result in found[world]:
        assert result["accuracy"] == alone
