"""A plain trainer and a loader of the user's own: what is wrong is one sentence, and nothing odd is printed."""

from __future__ import annotations

import logging

import pytest
import pytorch_lightning as pl
import torch
from conftest import TASKS
from torch.utils.data import DataLoader

import adaptive_merge as am
from adaptive_merge.errors import InputError

QUIET = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "accelerator": "cpu"}


def batches(count=4):
    generator = torch.Generator().manual_seed(0)
    return [
        {task: {"image": torch.randint(0, 256, (4, 3, 4, 4), generator=generator, dtype=torch.uint8)} for task in TASKS}
        for _ in range(count)
    ]


def trained(module, loader):
    trainer = pl.Trainer(max_steps=2, enable_progress_bar=False, **QUIET)
    trainer.fit(module, DataLoader(loader, batch_size=None))
    return trainer


def test_a_loader_of_plain_dictionaries_is_enough(toy, bank, heads):
    module = am.AdaMerging(bank, toy, heads)
    before = module.coefficients.values.detach().clone()
    assert trained(module, batches()).global_step == 2
    assert not torch.equal(module.coefficients.values, before)


IMAGE = torch.zeros(4, 3, 4, 4)
WRONG = {
    "a tensor": (IMAGE, "the loader gave a Tensor"),
    "a list": ([IMAGE, IMAGE], "the loader gave a list"),
    "nothing": ({}, "gave an empty one"),
    "another task": ({"rde": {"image": IMAGE}}, "no task 'rde'; did you mean 'red'"),
    "a bare tensor": ({"red": IMAGE}, "task 'red' is a Tensor"),
    "another name": ({"red": {"images": IMAGE}}, "task 'red' is ['images']"),
    "no tensor": ({"red": {"image": "cat.png"}}, "task 'red' is ['image']"),
    "one number an image": ({"red": {"image": torch.zeros(4)}}, "add the batch's axis"),
    "channels last": ({"red": {"image": torch.zeros(4, 8, 8, 3)}}, "the channels come first"),
    "indices of others": ({"red": {"image": IMAGE, "index": torch.arange(3)}}, "4 images with 3 indices"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_batch_is_told(name, toy, bank, heads):
    batch, words = WRONG[name]
    with pytest.raises(InputError) as error:
        trained(am.AdaMerging(bank, toy, heads), [batch])
    assert words in str(error.value)


def test_fit_then_validate_says_what_learns_and_nothing_of_callbacks_or_epochs(
    toy, bank, heads, images, caplog, capsys, monkeypatch
):
    module, stream = am.AdaMerging(bank, toy, heads), am.TaskStream(images, 4)
    # Lightning may have a handler of its own above this logger, and hand nothing on.
    logger = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    with caplog.at_level(logging.INFO, logger=logger.name):
        trainer = pl.Trainer(max_steps=2, **QUIET)
        trainer.fit(module, datamodule=stream)
        trainer.validate(module, datamodule=stream, verbose=False)
    words = caplog.text + "".join(capsys.readouterr())
    assert "3 experts of" in words and "all frozen" in words
    assert f"{module.coefficients.values.numel():,} parameters learn" in words
    assert "CloseBank" not in words and "/-2" not in words


def test_a_finished_run_goes_on_with_more_steps(toy, bank, heads, images, tmp_path):
    def run(steps, **options):
        torch.manual_seed(0)
        module = am.AdaMerging(bank, toy, heads)
        trainer = pl.Trainer(max_steps=steps, enable_progress_bar=False, default_root_dir=tmp_path, **QUIET)
        trainer.fit(module, datamodule=am.TaskStream(images, 4), **options)
        return trainer, module

    trainer, _ = run(2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    trainer, resumed = run(5, ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    assert trainer.global_step == 5
    assert torch.equal(resumed.coefficients.values, run(5)[1].coefficients.values)
