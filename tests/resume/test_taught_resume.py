"""A resumed run hears from frozen networks, to the bit, what the uninterrupted one heard."""

import pytest
import pytorch_lightning as pl
import torch
from conftest import TASKS, Toy, perturbed
from processes import guarded, parts

import adaptive_merge as am

STEPS, SIZES = 14, {"red": 31, "green": 57, "blue": 20}


class Crowd(Toy):
    """A tower whose rows depend on the batch that they are in, as last bits do, only more."""

    def forward(self, images):
        features = super().forward(images)
        return features + 0.01 * features.mean(0) * torch.linspace(0, 1, len(features))[:, None]


class Counted(pl.Callback):
    """How many images frozen networks have been asked for, before the first step of a fit."""

    rows = None

    def on_train_batch_start(self, trainer, module, *_):
        tables = module.views.outputs._tables.items()
        self.rows = self.rows or {key: int(table.known.sum()) for key, table in tables}


class Break(pl.Callback):
    """Saves the run after so many steps, and breaks it."""

    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path, weights_only=False)
            raise Broken


class Broken(Exception):
    pass


MADE = {
    "coefficients": lambda *given, **more: am.AdaMerging(*given, objective=am.PseudoLabel(soft=True), lr=0.05, **more),
    "blocks": lambda *given, **more: am.SurgeryV2(*given, rank=2, lr=0.05, **more),
    "frozen merge": lambda *given, **more: am.Surgery(*given, rank=2, lr=0.05, **more),
    "stages": lambda *given, **more: am.AdaptiveMerge(
        *given,
        coefficients=am.LayerWise(0.3),
        adapters=[am.FeatureSurgery(2)],
        stages=[
            am.Stage(5, "coefficients", am.ExpertDivergence()),
            am.Stage(20, "adapters", am.FeatureDistance()),
        ],
        lr=0.05,
        **more,
    ),
}


def fitted(folder, name, steps, source=None, stream=None, callbacks=(), **settings):
    """What a fit to `steps` ends with, from a checkpoint on."""
    _, _, heads, images = parts(SIZES)
    torch.manual_seed(0)
    toy = Crowd()
    bank = am.TaskVectors.from_state_dicts(
        toy.state_dict(), {task: perturbed(toy.state_dict(), seed) for seed, task in enumerate(TASKS)}
    )
    module = MADE[name](bank, toy, heads, **settings)
    trainer = guarded(folder, 1, callbacks, max_steps=steps, accumulate_grad_batches=2)
    data = am.TaskStream(images, **{"images_per_task": 4} | (stream or {}))
    trainer.fit(module, datamodule=data, ckpt_path=source, weights_only=True)
    return {name: value.clone() for name, value in module.state_dict().items()} | trainer.callback_metrics


@pytest.mark.parametrize(
    ("name", "stream", "cached"),
    [
        ("coefficients", {}, False),
        ("coefficients", {"sampling": "epoch"}, True),
        ("coefficients", {"protocol": am.Online(), "images_per_task": 2}, False),
        ("blocks", {"schedule": "shuffled"}, False),
        ("frozen merge", {}, True),
        ("stages", {}, False),
    ],
)
def test_taught_runs_resume_to_the_bit(tmp_path, name, stream, cached):
    def folders(which):
        return {"cache": str(tmp_path / which)} if cached else {}

    for which in ("whole", "broken") if cached else ():  # rows of an earlier run, in other batches
        fitted(tmp_path, name, 2, stream={"images_per_task": 7}, **folders(which))
    whole = fitted(tmp_path, name, STEPS, stream=stream, **folders("whole"))
    with pytest.raises(Broken):
        fitted(tmp_path, name, STEPS, None, stream, [Break(tmp_path / "6.ckpt", 6)], **folders("broken"))
    resumed = fitted(tmp_path, name, STEPS, tmp_path / "6.ckpt", stream, **folders("broken"))
    # A task that had come to its end is in the metrics of the whole run alone.
    assert {key: torch.equal(value, whole[key]) for key, value in resumed.items()} == dict.fromkeys(resumed, True)


def test_a_resumed_run_asks_for_nothing_that_it_has_not_seen(tmp_path):
    with pytest.raises(Broken):
        fitted(tmp_path, "coefficients", 5, callbacks=[Break(tmp_path / "3.ckpt", 3)])
    counted = Counted()
    fitted(tmp_path, "coefficients", 5, tmp_path / "3.ckpt", callbacks=[counted])
    draws = am.TaskStream(parts(SIZES)[3], 4).draws
    seen = {task: len(set(torch.cat([draws[step][task] for step in range(6)]).tolist())) for task in TASKS}
    assert counted.rows == {(task, "expert"): number for task, number in seen.items()}
