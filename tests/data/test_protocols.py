"""Which images are adapted on and scored, and that no prediction knows what comes after it."""

import pytest
import pytorch_lightning as pl
import torch
from processes import QUIET

import adaptive_merge as am
from adaptive_merge.data.sampler import Draws
from adaptive_merge.runs.online import prequential


def run(parts, stream, steps=6, recipe=am.AdaMerging, callbacks=(), **settings):
    """Fit and score with a ledger; the module, the ledger's rows and the evaluation."""
    bank, toy, heads = parts
    torch.manual_seed(0)  # surgery starts at random
    own = {"rank": 2} if recipe is am.Surgery else {}
    module = recipe(bank, toy, heads, unseen=stream.protocol.unseen, **{"lr": 0.05} | own | settings)
    ledger = am.Ledger()
    trainer = pl.Trainer(max_steps=steps, callbacks=[*callbacks, ledger], **QUIET)
    trainer.fit(module, datamodule=stream)
    return module, ledger.read(), am.evaluate(trainer, module, stream)


@pytest.fixture
def parts(bank, toy, heads):
    return bank, toy, heads


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def relabelled(images):
    """The same images, other labels."""
    return {task: am.Images(one.pixels, one.labels.roll(1), one.classes) for task, one in images.items()}


def test_transductive_adapts_and_scores_on_all(parts, images):
    _, rows, _ = run(parts, am.TaskStream(images, 8), steps=20)
    assert all(row["adapted"].all() and row["scored"].all() for row in rows.values())


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_holdout_adapts_on_one_part_and_scores_the_other_by_the_runs_own_record(parts, images, share):
    stream = am.TaskStream(images, 8, protocol=am.Holdout(share))
    _, rows, _ = run(parts, stream, steps=20)
    for task, row in rows.items():
        assert not (row["adapted"] & row["scored"]).any()
        assert row["adapted"].sum() > 0 and row["scored"].sum() == len(stream.scored[task])
        assert abs(int(row["scored"].sum()) - (1 - share) * len(row["scored"])) <= 1


def test_holdout_is_divided_by_its_own_seed_not_by_that_of_the_run(images):
    pools = [am.TaskStream(images, seed=seed, protocol=am.Holdout()).draws.pools["red"] for seed in (0, 1)]
    assert torch.equal(*pools)
    assert not torch.equal(pools[0], am.TaskStream(images, protocol=am.Holdout(seed=5)).draws.pools["red"])


def test_holdout_needs_two_images_and_a_share():
    with pytest.raises(am.InputError, match="between 0 and 1"):
        am.Holdout(1.0)
    with pytest.raises(am.InputError, match="needs one to adapt on and one to score"):
        am.Holdout().adapted("red", 1)


@pytest.mark.parametrize("schedule", ["joint", "shuffled"])
@pytest.mark.parametrize("batch", [1, 4, 100])
def test_online_sees_every_image_once_and_ends_with_the_pass(parts, images, schedule, batch):
    stream = am.TaskStream(images, batch, schedule=schedule, protocol=am.Online())
    counts = {task: torch.zeros(len(one), dtype=torch.int64) for task, one in images.items()}
    for step in range(stream.draws.end):
        for task, index in stream.draws[step].items():
            counts[task][index] += 1
    assert all((count == 1).all() for count in counts.values())
    module, rows, _ = run(parts, stream, steps=2)
    turns = [-(-len(one) // batch) for one in images.values()]
    assert stream.draws.end == (max(turns) if schedule == "joint" else sum(turns))
    assert all(row["adapted"].all() and (row["first"] >= 0).all() for row in rows.values())


def test_online_the_first_image_is_predicted_by_the_start(parts, images):
    stream = am.TaskStream(images, 4, protocol=am.Online())
    bank, toy, heads = parts
    start = am.AdaMerging(bank, toy, heads)
    _, rows, _ = run(parts, stream)
    for task, index in stream.draws[0].items():
        said = start(task, images[task].take(index)).argmax(-1)
        assert torch.equal(rows[task]["first"][index].long(), said)


def test_online_labels_change_no_prediction(parts, images):
    module, rows, _ = run(parts, am.TaskStream(images, 2, protocol=am.Online()))
    other, changed, _ = run(parts, am.TaskStream(relabelled(images), 2, protocol=am.Online()))
    assert all(torch.equal(rows[task]["first"], changed[task]["first"]) for task in rows)
    assert torch.equal(module.coefficients.values, other.coefficients.values)


@pytest.mark.parametrize("recipe", [am.AdaMerging, am.Surgery, am.TintingPP])
def test_online_future_images_change_no_earlier_prediction(parts, images, recipe):
    """With the guard, which watches images of the past alone."""
    stream = am.TaskStream(images, 2, protocol=am.Online())
    split = 5
    later = {
        task: torch.cat(
            [stream.draws[step][task] for step in range(split, stream.draws.end) if task in stream.draws[step]]
        )
        for task in images
    }
    edited = {}
    for task, one in images.items():
        pixels = one.pixels.clone()
        pixels[later[task]] = 255 - pixels[later[task]]
        edited[task] = am.Images(pixels, one.labels, one.classes)
    rows, changed = (
        run(parts, am.TaskStream(one, 2, protocol=am.Online()), 6, recipe, [am.Guard(every=2, images=4)], lr=0.2)[1]
        for one in (images, edited)
    )
    differs = 0
    for task in images:
        past = torch.ones(len(images[task]), dtype=torch.bool)
        past[later[task]] = False
        assert torch.equal(rows[task]["first"][past], changed[task]["first"][past])
        differs += int((rows[task]["first"] != changed[task]["first"]).sum())
    assert differs > 0


def test_online_learns_in_the_pass(parts, images):
    module, rows, evaluation = run(parts, am.TaskStream(images, 2, protocol=am.Online()), lr=0.1)
    assert not torch.equal(module.coefficients.values, module.views.start)
    assert any((row["first"] != row["final"]).any() for row in rows.values())


def test_prequential_counts_first_predictions_in_the_order_of_the_stream():
    labels = torch.tensor([0, 1, 2, 3])
    rows = {"first": torch.tensor([0, 1, 0, -1]), "final": torch.tensor([9, 9, 2, 3])}
    found = prequential(rows, labels, torch.tensor([2, 0, 1, 3]))
    assert found.accuracy == 0.75 and found.predicted == 3
    assert found.images == [1, 2, 3, 4] and found.curve == pytest.approx([0, 1 / 2, 2 / 3, 3 / 4])


def test_unseen_tasks_are_scored_but_neither_merged_nor_adapted_on(parts, images):
    stream = am.TaskStream(images, 4, protocol=am.Unseen(["green"]))
    bank, toy, heads = parts
    module, rows, evaluation = run(parts, stream, recipe=am.Surgery)
    assert module.tasks == ("red", "blue") and module.scored_tasks == ("red", "green", "blue")
    assert not rows["green"]["adapted"].any() and rows["green"]["scored"].all()
    without = am.TaskArithmetic(bank.select(["red", "blue"]), toy, heads)
    features = without.model.backbone(images["green"].take(torch.arange(len(images["green"]))))
    said = (torch.nn.functional.normalize(features, dim=-1) @ heads["green"].T).argmax(-1)
    wanted = float((said == images["green"].labels).float().mean())
    assert evaluation["adapted"]["green"]["accuracy"] == pytest.approx(wanted)
    assert evaluation["initial"]["green"]["accuracy"] == pytest.approx(wanted)
    assert "agreement" in evaluation["adapted"]["red"] and "agreement" not in evaluation["adapted"]["green"]


def test_unseen_refuses_unknown_tasks_and_leaving_out_all(images, parts):
    with pytest.raises(am.InputError, match="did you mean 'green'"):
        am.TaskStream(images, protocol=am.Unseen(["gren"]))
    with pytest.raises(am.InputError, match="all tasks are left out"):
        am.TaskStream(images, protocol=am.Unseen(["red", "green", "blue"]))
    with pytest.raises(am.InputError, match="at least one task"):
        am.Unseen([])
    module = am.AdaMerging(*parts)
    with pytest.raises(am.InputError, match="give both the same tasks"):
        pl.Trainer(max_steps=1, **QUIET).fit(module, datamodule=am.TaskStream(images, protocol=am.Unseen(["red"])))


def test_watched_images_are_fixed_and_adapted_on_or_past(images):
    held = am.TaskStream(images, 4, protocol=am.Holdout(), seed=3)
    first = held.watched("red", 6, 0)
    assert torch.equal(first, held.watched("red", 6, 9)) and len(first) == 6
    assert set(first.tolist()) <= set(held.draws.pools["red"].tolist())
    online = am.TaskStream(images, 4, protocol=am.Online())
    assert len(online.watched("red", 6, 0)) == 0
    past = torch.cat([online.draws[step]["red"] for step in range(3)])
    assert torch.equal(online.watched("red", 6, 3), past[-6:])


@pytest.mark.parametrize("corruption", [None, am.Corruption("gaussian_noise", 5)])
def test_the_stream_itself_is_corrupted(parts, images, corruption):
    stream = am.TaskStream(images, 4, corruption=corruption)
    batch = stream.train_dataloader().dataset[0]["red"]
    scored = next(iter(stream.val_dataloader()[0]))["image"]
    same = torch.equal(batch["image"], images["red"].take(batch["index"]))
    assert same == (corruption is None)
    assert torch.equal(scored, images["red"].take(torch.arange(len(scored)))) == (corruption is None)


def test_draws_of_a_pool_are_numbers_of_images():
    draws = Draws({"red": torch.tensor([3, 5, 8, 13])}, batch=3, seed=1)
    assert set(draws[0]["red"].tolist()) <= {3, 5, 8, 13} and draws.end is None
