import pytest
import torch

import adaptive_merge as am
from adaptive_merge.suites.embedded_tower import build_encoder


@pytest.fixture(scope="module")
def suite():
    return am.load_suite("embedded")


def test_eight_tasks_belong_together(suite):
    assert len(suite.task_vectors.tasks) == 8
    assert list(suite.images) == list(suite.heads) == list(suite.task_vectors.tasks)
    assert all(len(images) >= 500 for images in suite.images.values())
    assert sum(p.numel() for p in suite.backbone.parameters()) <= 1_500_000


def test_the_bank_is_in_the_backbones_order(suite):
    assert list(suite.task_vectors.names) == [name for name, _ in build_encoder().named_parameters()]


def test_splits_share_no_image():
    parts = [am.load_suite("embedded", tasks=["mnist"], split=split).images["mnist"] for split in ("test", "val")]
    test, val = ({image.numpy().tobytes() for image in part.pixels} for part in parts)
    assert not test & val


def test_the_regime_of_the_literature_on_a_part_of_the_images(suite):
    """Pre-trained far below the experts, the merge in between: on 200 images a task, with room for chance."""

    def accuracy(view, task):
        images = suite.images[task]
        index = torch.arange(0, len(images), max(len(images) // 200, 1))
        module.eval()
        with torch.no_grad():
            weights = module.views.weights(view, task)
            logits = module.model(task, images.take(index), weights).logits
        return (logits.argmax(1) == images.labels[index]).float().mean().item()

    module = am.TaskArithmetic(suite.task_vectors, suite.backbone, suite.heads)
    views = ("pretrained", "initial", "individual")
    means = {view: sum(accuracy(view, task) for task in suite.images) / 8 for view in views}
    assert means["individual"] > 0.92
    assert means["pretrained"] < 0.70
    assert means["pretrained"] < means["initial"] < means["individual"] - 0.12


def test_subsets_keep_their_order_and_unknown_tasks_are_named():
    assert am.load_suite(tasks=["latin", "mnist"]).task_vectors.tasks == ("latin", "mnist")
    with pytest.raises(am.InputError, match="no task 'minst'; did you mean 'mnist'"):
        am.load_suite(tasks=["minst"])
