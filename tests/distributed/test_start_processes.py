"""A start on one process or two: the same solution, and learning goes on from it alike."""

import pytest
import pytorch_lightning as pl
import torch
from open_clip.transformer import VisionTransformer
from processes import guarded, launch, parts, texts

import adaptive_merge as am
from adaptive_merge.starts.store import FileStore


class Blocks(pl.Callback):
    """End the process after so many blocks of a start."""

    def __init__(self, last):
        self.last = last

    def on_start_progress(self, trainer, done, total):
        if done == self.last:
            raise RuntimeError("killed")


def run(rank, world, folder, last=None):
    bank, toy, heads, images = parts()
    module = am.AdaptiveMerge(
        bank,
        toy,
        heads,
        coefficients=am.LayerWise(0.3, bounds="free"),
        start=am.CompensatedRegression(0.1),
        lr=0.01,
        accumulate="joint",
    )
    module.start_folder = folder / f"world{world}"
    module.start_folder.mkdir(exist_ok=True)
    solved, save = [], FileStore.save
    FileStore.save = lambda self, identity, done, tensors: (solved.append(done), save(self, identity, done, tensors))
    trainer = guarded(folder, world, [Blocks(last)], max_steps=5, limit_val_batches=0)
    trainer.fit(module, datamodule=am.TaskStream(images, 8, start_images=13))
    values = {"weights": module.begun.weights, "coefficients": module.coefficients().detach()}
    values["distilled"] = distilled(world, folder, heads, images)
    torch.save({"values": values, "images": module.begun.record["images"], "solved": solved}, folder / f"{rank}.pt")


def distilled(world, folder, heads, images):
    """What ProDistill makes of a small transformer, in the same processes; one of them has more images."""
    torch.manual_seed(0)
    tower = VisionTransformer(4, 2, 16, 2, 2, 2.0, output_dim=6)
    tower.image_mean, tower.image_std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    state = tower.state_dict()
    experts = {task: {name: value + 0.1 * torch.randn_like(value) for name, value in state.items()} for task in images}
    bank = am.TaskVectors.from_state_dicts(state, experts)
    start = am.ProDistill(epochs=2, batch_size=8)
    module = am.AdaptiveMerge(bank, tower, heads, coefficients=am.Fixed(0.3), start=start)
    trainer = guarded(folder / f"distilled{world}", world, [], max_steps=0, limit_val_batches=0)
    trainer.fit(module, datamodule=am.TaskStream(images, 8, start_images=13))
    return module.begun.weights


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Number of processes → what each of them has at the end."""
    found = {}
    for world in (1, 2):
        folder = tmp_path_factory.mktemp(f"start{world}")
        codes = launch(world, run, world, folder, folder=folder)
        assert codes == [0] * world, texts(folder)
        found[world] = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]
        assert (folder / f"world{world}" / "start.safetensors").is_file()
    return found


def test_processes_solve_and_learn_what_one_does(results):
    alone = results[1][0]["values"]
    for result in results[2]:
        scale = alone["weights"].abs().max()
        assert (result["values"]["weights"] - alone["weights"]).abs().max() / scale <= 1e-5
        torch.testing.assert_close(result["values"]["coefficients"], alone["coefficients"], atol=1e-4, rtol=0)
    assert set(results[2][0]["images"].values()) == {13}


def test_a_learned_start_is_the_one_process_s_to_the_bit(results):
    alone = results[1][0]["values"]["distilled"]
    assert all(torch.equal(result["values"]["distilled"], alone) for result in results[2])


def test_processes_hold_the_same_bits(results):
    first, second = (result["values"] for result in results[2])
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_start_that_was_killed_goes_on_after_its_last_block(results, tmp_path):
    assert launch(2, run, 2, tmp_path, 2, folder=tmp_path) == [1, 1], texts(tmp_path)
    assert (tmp_path / "world2" / "start.partial.safetensors").is_file()
    assert launch(2, run, 2, tmp_path, folder=tmp_path) == [0, 0], texts(tmp_path)
    assert not (tmp_path / "world2" / "start.partial.safetensors").exists()
    for rank, whole in enumerate(results[2]):
        again = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert again["solved"] == whole["solved"][2:] and whole["solved"][:2] == ([] if rank else [1, 2])
        assert all(torch.equal(again["values"][name], value) for name, value in whole["values"].items())
