"""What the safeguards cost a step. The figure is the result; there is nothing that it has to reach."""

import statistics
import time

import pytest
import pytorch_lightning as pl
from processes import guarded, launch, parts, texts

import adaptive_merge as am


class Clock(pl.Callback):
    def __init__(self):
        self.times = []

    def on_train_batch_end(self, *_):
        self.times.append(time.perf_counter())

    def milliseconds(self):
        return 1e3 * statistics.median(after - before for before, after in zip(self.times, self.times[1:]))


def measure(rank, world, folder):
    medians = []
    for watched in (True, False):
        bank, toy, heads, images = parts()
        clock = Clock()
        trainer = guarded(folder, world, [clock], max_steps=300)
        trainer.callbacks[:] = trainer.callbacks if watched else [clock]
        trainer.fit(am.AdaMerging(bank, toy, heads), datamodule=am.TaskStream(images, 8))
        medians.append(clock.milliseconds())
    (folder / f"{rank}.txt").write_text("{:.2f} with, {:.2f} without".format(*medians))


@pytest.mark.soak
@pytest.mark.parametrize("world", [1, 2])
def test_cost_of_a_step(tmp_path, world, record_property):
    assert launch(world, measure, world, tmp_path, folder=tmp_path) == [0] * world, texts(tmp_path)
    record_property("milliseconds", (tmp_path / "0.txt").read_text())
