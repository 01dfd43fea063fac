"""A start on one process or two: the same solution, and learning goes on from it alike."""

import pytest
import torch
from conftest import perturbed
from open_clip.transformer import VisionTransformer
from processes import guarded, launch, parts, texts

import adaptive_merge as am


def run(rank, world, folder):
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
    trainer = guarded(folder, world, [], max_steps=5, limit_val_batches=0)
    trainer.fit(module, datamodule=am.TaskStream(images, 8, start_images=13))
    values = {"weights": module.begun.weights, "coefficients": module.coefficients().detach()}
    values["distilled"] = distilled(world, folder, heads, images)
    torch.save({"values": values, "images": module.begun.record["images"]}, folder / f"{rank}.pt")


def distilled(world, folder, heads, images):
    """What ProDistill makes of a small transformer, in the same processes; one of them has more images."""
    torch.manual_seed(0)
    tower = VisionTransformer(4, 2, 16, 2, 2, 2.0, output_dim=6)
    tower.image_mean, tower.image_std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    experts = {task: perturbed(tower.state_dict(), seed) for seed, task in enumerate(images)}
    bank = am.TaskVectors.from_state_dicts(tower.state_dict(), experts)
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
