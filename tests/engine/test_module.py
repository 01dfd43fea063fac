import pytest
import pytorch_lightning as pl
import reference
import torch
from fitting import STEPS, Trajectory, fit

import adaptive_merge as am
from adaptive_merge.data.sampler import draw

RECIPES = {
    "task": (am.AdaMerging, "task"),
    "layer": (am.AdaMerging, "layer"),
    "task++": (am.AdaMergingPP, "task"),
    "layer++": (am.AdaMergingPP, "layer"),
}


@pytest.mark.parametrize("accumulate", ["joint", "per_task"])
@pytest.mark.parametrize("name", RECIPES)
def test_trajectory_equals_the_published_loop(toy, bank, heads, images, name, accumulate):
    recipe, granularity = RECIPES[name]
    learned = fit(recipe(bank, toy, heads, granularity=granularity, accumulate=accumulate), images)
    vectors = reference.ties(bank.vectors) if name.endswith("++") else bank.vectors

    def stream(step):
        return {
            task: source.take(torch.from_numpy(draw(len(source), 8, 0, task, step))) for task, source in images.items()
        }

    expected = reference.adamerging(
        toy,
        bank.layout.unflatten(bank.pretrained),
        [bank.layout.unflatten(vector) for vector in vectors],
        heads,
        stream,
        layer_wise=granularity == "layer",
        steps=STEPS,
    )
    torch.testing.assert_close(learned, expected, rtol=1e-5, atol=1e-6)


SILENT = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}


def test_a_module_that_was_scored_can_be_fitted(toy, bank, heads, images):
    module, stream = am.AdaMerging(bank, toy, heads), am.TaskStream(images, 8)
    am.score(pl.Trainer(**SILENT), module, stream)
    trainer = pl.Trainer(max_steps=2, **SILENT)
    trainer.fit(module, datamodule=stream)
    assert trainer.global_step == 2


def test_tasks_without_images_are_left_out_of_the_scores(toy, bank, heads, images):
    module = am.AdaMerging(bank, toy, heads)
    scores = am.score(pl.Trainer(**SILENT), module, am.TaskStream({"green": images["green"]}))
    assert list(scores["adapted"]) == ["green"]
    trainer = pl.Trainer(**SILENT)
    trainer.validate(module, am.TaskStream(images).val_dataloader()[:1], verbose=False)
    shown = {key for key in trainer.callback_metrics if key.endswith("accuracy")}
    assert shown == {"adapted/red/accuracy", "adapted/accuracy"}


def test_unseen_tasks_and_loaders_of_ones_own(toy, bank, heads, images):
    module, stream = (
        am.AdaMerging(bank, toy, heads, unseen=["green"]),
        am.TaskStream(images, protocol=am.Unseen(["green"])),
    )
    pl.Trainer(max_steps=2, **SILENT).fit(module, stream.train_dataloader())
    assert set(module.merged_fingerprints) == {"pretrained", "red", "blue"}
    with pytest.raises(am.InputError, match="all tasks are left out"):
        am.AdaMerging(bank, toy, heads, unseen=bank.tasks)
    with pytest.raises(am.InputError, match="no task 'gren' to leave out"):
        am.AdaMerging(bank, toy, heads, unseen=["gren"])


def test_an_objective_keeps_nothing_of_a_run(toy, bank, heads, images):
    objective = am.Entropy(diversity=0.1)
    fit(am.AdaMerging(bank, toy, heads, objective=objective), images)
    assert vars(objective) == vars(am.Entropy(diversity=0.1))


def test_permuting_the_labels_changes_no_bit(toy, bank, heads, images):
    first = fit(am.AdaMerging(bank, toy, heads), images)
    for source in images.values():
        source.labels = source.labels.flip(0)
    assert torch.equal(first, fit(am.AdaMerging(bank, toy, heads), images))


def test_same_seed_same_bits_other_seed_other_bits(toy, bank, heads, images):
    first, second = (fit(am.AdaMerging(bank, toy, heads), images) for _ in range(2))
    assert torch.equal(first, second)


def test_views_score_the_models_they_name(toy, bank, heads, images, experts):
    module = am.AdaMerging(bank, toy, heads, lr=0.05)
    fit(module, images)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    scores = am.score(trainer, module, am.TaskStream(images))

    def accuracy(state, task):
        everything = images[task].take(torch.arange(len(images[task])))
        return (
            (reference.logits_of(toy, state, everything, heads[task]).argmax(1) == images[task].labels)
            .float()
            .mean()
            .item()
        )

    start = reference.merge(
        bank.layout.unflatten(bank.pretrained),
        [bank.layout.unflatten(v) for v in bank.vectors],
        torch.full((3, 1), 0.3),
    )
    for task in images:
        assert scores["pretrained"][task] == pytest.approx(accuracy(toy.state_dict(), task))
        assert scores["individual"][task] == pytest.approx(accuracy(experts[task], task))
        assert scores["initial"][task] == pytest.approx(accuracy(start, task))
        assert scores["adapted"][task] == pytest.approx(accuracy(module.merged_state_dict(), task))


def test_checkpoint_is_small_resumes_and_knows_its_experts(toy, bank, heads, images, tmp_path):
    whole = fit(am.AdaMerging(bank, toy, heads), images)
    module = am.AdaMerging(bank, toy, heads)
    trainer = pl.Trainer(
        max_steps=7,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, datamodule=am.TaskStream(images, images_per_task=8))
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    assert path.stat().st_size < 20_000

    resumed, trajectory = am.AdaMerging(bank, toy, heads), Trajectory()
    again = pl.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        callbacks=[trajectory],
        default_root_dir=tmp_path,
    )
    again.fit(resumed, datamodule=am.TaskStream(images, images_per_task=8), ckpt_path=path)
    assert torch.equal(torch.stack(trajectory.values), whole[7:])

    other = am.AdaMerging(bank * 2, toy, heads)
    with pytest.raises(am.InputError, match="another experts"):
        again.fit(other, datamodule=am.TaskStream(images), ckpt_path=path)


def test_nothing_to_learn_is_refused(toy, bank, heads, images):
    with pytest.raises(am.InputError, match="nothing to learn"):
        fit(am.TaskArithmetic(bank, toy, heads), images)


def test_bad_heads_are_named(toy, bank, heads):
    with pytest.raises(am.InputError, match="'green' has an expert but no head"):
        am.TaskArithmetic(bank, toy, {"red": heads["red"]})
    with pytest.raises(am.InputError, match="head of task 'blue' has shape"):
        am.TaskArithmetic(bank, toy, heads | {"blue": torch.zeros(2, 5)})
    with pytest.raises(am.InputError, match="no head for task 'reed'; did you mean 'red'"):
        am.TaskArithmetic(bank, toy, heads)("reed", torch.zeros(1, 3, 4, 4))


def test_bfloat16_autocast_stays_close_and_keeps_coefficients_float32(toy, bank, heads, images):
    exact = fit(am.AdaMerging(bank, toy, heads), images)
    rough = fit(am.AdaMerging(bank, toy, heads), images, precision="bf16-mixed")
    assert rough.dtype == torch.float32
    assert (exact - rough).abs().max() < 0.01


def test_public_names_are_importable():
    for name in am.__all__:
        assert getattr(am, name) is not None
