"""The guard on several processes: they share the images and take one decision, that of a single process."""

import pytest
import pytorch_lightning as pl
import torch
from processes import guarded, launch, parts, texts

import adaptive_merge as am
from adaptive_merge.callbacks.guard.guard import Guard
from adaptive_merge.data.protocols import Online


class Steer(pl.Callback):
    """Put the coefficients where they are wanted: from a step on."""

    def __init__(self, values):
        self.values = values

    def on_train_batch_end(self, trainer, module, *_):
        known = [step for step in self.values if step <= trainer.global_step]
        if known:
            with torch.no_grad():
                module.coefficients.values.fill_(self.values[max(known)])


RUNS = {
    "collapse": (am.AdaMerging, {4: 0.25, 10: -9.0}, {"bounds": "free"}, {}),
    "collapse, sharded": (am.AdaMerging, {4: 0.25, 10: -9.0}, {"bounds": "free", "bank": "sharded"}, {}),
    "agreement": (am.AdaMerging, {4: 0.2, 7: 0.5, 13: 0.0}, {}, {"select": "agreement"}),
    "js, tasks shared out": (am.AdaMerging, {4: 0.2, 7: 0.5, 13: 0.0}, {}, {"select": "js"}),
    "entropy, one pass": (am.TintingPP, {2: 0.2}, {}, {"select": "entropy"}),
}


def run_all(rank, world, folder):
    """Everything that is compared, in one launch."""
    found = {}
    for name, (make, steer, settings, options) in RUNS.items():
        bank, toy, heads, images = parts()
        stream = {"share": "tasks"} if "tasks" in name else {"protocol": Online()} if "one pass" in name else {}
        module, guard = make(bank, toy, heads, lr=1e-4, **settings), Guard(3, 21, **options)
        trainer = guarded(folder, world, [Steer(steer), guard], max_steps=24, limit_val_batches=0)
        trainer.fit(module, datamodule=am.TaskStream(images, 8, **stream))
        state = [value.detach().clone() for value in module.learned]
        found[name] = {"record": guard.record(), "state": state, "steps": trainer.global_step}
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Number of processes → what each of them found."""
    results = {}
    for world in (1, 2):
        folder = tmp_path_factory.mktemp(f"world{world}")
        codes = launch(world, run_all, world, folder, folder=folder)
        assert codes == [0] * world, texts(folder)
        results[world] = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]
    return results


@pytest.mark.parametrize("name", RUNS)
def test_all_processes_decide_as_one(found, name):
    first, second = (part[name] for part in found[2])
    assert first["record"] == second["record"] and first["steps"] == second["steps"]
    assert all(torch.equal(*pair) for pair in zip(first["state"], second["state"]))
    alone = found[1][0][name]
    assert first["steps"] == alone["steps"]
    for key in ("kept_step", "checks"):
        assert first["record"][key] == alone["record"][key]
    told = [
        [(warning["step"], warning["signal"], warning["task"]) for warning in one["record"]["warnings"]]
        for one in (first, alone)
    ]
    assert told[0] == told[1]
    assert bool(alone["record"]["stopped"]) is ("collapse" in name) is bool(first["record"]["stopped"])
    if "collapse" in name:
        assert first["record"]["kept_step"] == 0
        assert torch.equal(first["state"][0], torch.full_like(first["state"][0], 0.3))
