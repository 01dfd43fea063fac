import numpy as np
import pytest
import torch

import adaptive_merge as am
from adaptive_merge.data.sampler import draw, shuffled
from adaptive_merge.engine.identity import of_data


def test_draws_are_functions_of_seed_task_and_step():
    assert np.array_equal(draw(100, 8, 0, "a", 3), draw(100, 8, 0, "a", 3))
    draws = [draw(100, 8, *key) for key in [(0, "a", 3), (1, "a", 3), (0, "b", 3), (0, "a", 4)]]
    assert len({tuple(indices) for indices in draws}) == 4


def test_fresh_draws_have_no_repeats_and_shrink_to_the_data():
    assert len(set(draw(20, 16, 0, "a", 0))) == 16
    assert sorted(draw(5, 16, 0, "a", 0)) == [0, 1, 2, 3, 4]


def test_epoch_draws_visit_every_image_once_per_pass():
    seen = np.concatenate([draw(10, 4, 0, "a", step, "epoch") for step in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert list(seen[:10]) != list(seen[10:])


def test_every_round_holds_every_task_once():
    assert sorted(shuffled(("a", "b", "c"), 0, 4)) == ["a", "b", "c"]
    assert len({tuple(shuffled(("a", "b", "c"), 0, turn)) for turn in range(20)}) > 1


def test_training_batches_hold_no_labels(images):
    stream = am.TaskStream(images, images_per_task=6)
    step = stream.train_dataloader().dataset[0]
    assert set(step) == set(images)
    assert all(set(part) == {"image", "index"} for part in step.values())
    assert step["red"]["image"].shape == (6, 3, 4, 4) and step["red"]["image"].dtype == torch.uint8


def test_processes_share_the_global_batch_and_score_each_image_once(images):
    whole = am.TaskStream(images, images_per_task=6).train_dataloader().dataset[2]["red"]["index"]
    shares, scored = [], []
    for rank in range(3):
        stream = am.TaskStream(images, images_per_task=6, eval_batch_size=4)
        stream._ranks = lambda rank=rank: (rank, 3)
        shares.append(stream.train_dataloader().dataset[2]["red"]["index"])
        scored += [index for part in stream.val_dataloader()[0] for index in part["index"].tolist()]
    assert torch.equal(torch.stack(shares, 1).flatten(), whole)
    assert sorted(scored) == list(range(len(images["red"])))


def test_shuffled_schedule_gives_one_task_a_step(images):
    dataset = am.TaskStream(images, schedule="shuffled").train_dataloader().dataset
    assert sorted(task for step in range(3) for task in dataset[step]) == sorted(images)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"images_per_task": 0}, "at least one image"),
        ({"probe_images": 0}, "at least one image, got probe_images=0"),
        ({"probe_images": 9, "protocol": am.Online()}, "a single pass adapts on every image"),
        ({"sampling": "random"}, "unknown sampling"),
        ({"schedule": "x"}, "unknown schedule"),
    ],
)
def test_bad_settings(images, settings, message):
    with pytest.raises(am.InputError, match=message):
        am.TaskStream(images, **settings)


def test_bad_images():
    pixels = torch.zeros(3, 4, 4, dtype=torch.uint8)
    with pytest.raises(am.InputError, match="empty"):
        am.Images(pixels[:0], torch.zeros(0, dtype=torch.int64), ["a"])
    with pytest.raises(am.InputError, match="3 images but 2 labels"):
        am.Images(pixels, torch.zeros(2, dtype=torch.int64), ["a"])
    with pytest.raises(am.InputError, match="there are 2 classes"):
        am.Images(pixels, torch.tensor([0, 1, 2]), ["a", "b"])


@pytest.mark.parametrize("sampling", ["fresh", "epoch"])
@pytest.mark.parametrize("protocol", [None, am.Holdout()])
def test_a_probe_set_is_all_that_a_run_adapts_on(images, sampling, protocol):
    settings = {"images_per_task": 6, "sampling": sampling, "protocol": protocol, "start_images": 20}
    stream = am.TaskStream(images, probe_images=9, **settings)
    allowed = am.TaskStream(images, **settings).draws.pools
    for task in images:
        seen = torch.cat([stream.draws[step][task] for step in range(30)])
        assert len(seen.unique()) == 9 and set(seen.tolist()) <= set(allowed[task].tolist())
        assert set(stream.opening(task).tolist()) == set(seen.tolist())
        assert set(stream.watched(task, 50, 3).tolist()) == set(seen.tolist())
    other = am.TaskStream(images, probe_images=9, seed=1, **settings)
    assert any(not torch.equal(stream.draws.pools[task], other.draws.pools[task]) for task in images)
    scored = am.TaskStream(images, **settings).scored
    assert all(torch.equal(places, scored[task]) for task, places in stream.scored.items())


def test_a_probe_set_larger_than_the_task_is_the_task(images):
    pools = am.TaskStream(images, probe_images=10_000).draws.pools
    assert all(torch.equal(pool, torch.arange(len(images[task]))) for task, pool in pools.items())


def test_another_probe_set_is_other_data(images):
    assert of_data(am.TaskStream(images, probe_images=9)) != of_data(am.TaskStream(images))
    assert "probe images" not in of_data(am.TaskStream(images))  # as files of earlier runs have it
