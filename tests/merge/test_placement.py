import os
import re
from pathlib import Path

import pytest
import torch
from conftest import Toy
from fitting import fit
from processes import start, wait

import adaptive_merge as am
from adaptive_merge.merge import placement
from adaptive_merge.merge.bank_file import kept_bank
from adaptive_merge.merge.layout import Layout
from adaptive_merge.merge.parts import BankPart

MAPPED = Path("/proc/self/smaps").is_file()
SETTINGS = {
    "layer-wise, joint": (am.AdaMerging, {"accumulate": "joint"}, {}),
    "layer-wise, per task": (am.AdaMerging, {"accumulate": "per_task"}, {}),
    "task-wise, joint": (am.AdaMerging, {"accumulate": "joint", "granularity": "task"}, {}),
    "task-wise, per task": (am.AdaMerging, {"accumulate": "per_task", "granularity": "task"}, {}),
    "surgery": (am.Surgery, {"rank": 2, "lr": 0.01}, {}),
    "tinting++, shuffled": (am.TintingPP, {}, {"schedule": "shuffled"}),
}


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces that cut through parameters: the toy has 616 entries."""
    monkeypatch.setattr(placement, "PIECE", 50)


def half(bank):
    return bank.with_vectors(bank.vectors.bfloat16())


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", ["streamed", "sharded"])
def test_all_kinds_learn_the_same(toy, bank, heads, images, small_pieces, kind, name, record_property):
    make, settings, stream = SETTINGS[name]

    def built(one):
        torch.manual_seed(0)  # adapters start at random
        return make(bank, toy, heads, bank=one, **settings)

    modules = [built(one) for one in ("resident", kind)]
    for module in modules:
        fit(module, images, stream=stream)
    whole, ours = (dict(module.named_parameters()) for module in modules)
    apart = max(((ours[key] - whole[key]).abs() / whole[key].abs().clamp_min(1)).max().item() for key in whole)
    record_property("difference", apart)
    assert apart <= 1e-6
    start_values = dict(built("resident").named_parameters())
    assert max((whole[key] - start_values[key]).abs().max().item() for key in whole) > 1e-4


@pytest.mark.parametrize("kind", ["streamed", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "cpu:0"])  # "cpu:0" is not where the bank is: pieces cross
def test_merge_and_gradient_are_those_of_the_whole_bank(toy, bank, small_pieces, kind, dtype, device):
    held = bank.with_vectors(bank.vectors.to(dtype))
    images = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    found = []
    for one in ("resident", kind):
        merged = am.MergedBackbone(toy, held, am.LayerWise(0.4), one)
        merged.placement.to(torch.device(device))
        merged.placement.open(0, 1)
        merged(images).square().sum().backward()
        found.append((merged.merged_state_dict(), merged.coefficients.values.grad))
    for name, value in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], value, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found[1][1], found[0][1], atol=1e-5, rtol=1e-5)


def test_a_parameter_without_a_gradient_counts_as_zero(toy, bank, small_pieces):
    gradients = [None if index % 3 else torch.ones(shape) for index, shape in enumerate(bank.layout.shapes)]
    rule = am.LayerWise(0.4).bind(bank)
    wanted = placement.Resident(bank).project(rule, gradients, rule.settled())
    for kind in ("streamed", "sharded"):
        ours = placement.place(bank, kind)
        ours.open(0, 1)
        torch.testing.assert_close(ours.project(rule, gradients, rule.settled()), wanted, atol=1e-5, rtol=1e-5)


def test_pieces_are_bounded_and_nothing_stays(bank, small_pieces, monkeypatch):
    crossed, widths = BankPart.on, []
    monkeypatch.setattr(
        BankPart, "on", lambda part, device: widths.append(part.bank.layout.numel) or crossed(part, device)
    )
    streamed, rule = placement.Streamed(bank), am.Fixed(0.3).bind(bank)
    streamed.combine(rule, rule.state())
    assert (sum(widths), max(widths)) == (bank.layout.numel, 50) and streamed.held_bytes == 0


@pytest.mark.parametrize("world", [1, 2, 5, 7])
def test_slices_are_equal_and_make_up_the_bank(bank, world):
    held = []
    for rank in range(world):
        slices = placement.Sharded(bank)
        slices.open(rank, world)
        held.append(slices.held_bytes)
    columns = bank.layout.numel // world + bank.layout.numel % world
    assert held == [columns * 4 * (len(bank.tasks) + 1)] * world


def test_an_unknown_kind_is_refused(toy, bank, heads):
    with pytest.raises(am.InputError, match="'sharded'"):
        am.AdaMerging(bank, toy, heads, bank="shard")


@pytest.mark.parametrize("kind", ["resident", "streamed", "sharded"])
def test_a_view_is_merged_once_however_often_experts_are_asked(toy, bank, heads, kind, monkeypatch):
    module = am.AdaMerging(bank, toy, heads, bank=kind)
    held, merges = module.model.backbone.placement, []
    combine = held.combine
    monkeypatch.setattr(held, "combine", lambda *args: merges.append(1) or combine(*args))
    part = {"image": torch.zeros(2, 3, 4, 4), "index": torch.arange(2)}
    for view in ("pretrained", "initial", "adapted", "individual"):
        merges.clear()
        module.views.prepare(view)
        for task in ("red", "blue", "red"):
            module.views.expert(task, part, None)
            weights = module.views.weights(view, task)
        assert len(merges) == (view in ("initial", "adapted"))
        if view == "pretrained":
            assert all(torch.equal(weights[name], value) for name, value in toy.state_dict().items())
        module.views.release()


def test_fingerprints_travel_with_the_bank(bank):
    prints = bank.fingerprints
    assert bank.to("cpu:0").fingerprints is prints


def test_a_bfloat16_bank_works_everywhere(toy, bank, heads, images, record_property):
    rough = half(bank)
    for task, name in (("green", "proj"), ("red", "stem.weight")):
        exact, rounded = (one.expert(task)[name] - toy.state_dict()[name] for one in (bank, rough))
        assert ((rounded - exact).abs() <= 0.004 * exact.abs() + 1e-6).all() and rounded.dtype == torch.float32
    trimmed = am.Ties(0.4)(rough)
    assert trimmed.vectors.dtype == torch.bfloat16 and 0 < trimmed.vectors.count_nonzero() < bank.vectors.numel() / 2
    exact, rounded = (am.MergedBackbone(toy, one, am.Fixed(0.3)).merge() for one in (bank, rough))
    bound = bank.layout.unflatten(0.004 * 0.3 * bank.vectors.abs().sum(0) + 1e-6)
    assert all(((rounded[name] - exact[name]).abs() <= bound[name]).all() for name in bank.names)
    for make in (am.AdaMerging, am.AdaMergingPP, am.TintingPP):
        learned = [fit(make(one, toy, heads), images)[-1] for one in (bank, rough)]
        record_property(make.__name__, (learned[0] - learned[1]).abs().max().item())
        assert all(
            values.isfinite().all() and not torch.equal(values, torch.full_like(values, 0.3)) for values in learned
        )


@pytest.mark.soak
@pytest.mark.parametrize("recipe", [am.AdaMerging, am.TintingPP])
def test_a_bfloat16_bank_learns_nearly_the_same_on_the_embedded_suite(recipe, record_property):
    found = []
    for dtype in ("float32", "bfloat16"):
        suite = am.load_suite("embedded", dtype=dtype)
        module = recipe(suite.task_vectors, suite.backbone, suite.heads)
        fit(module, suite.images, steps=20, stream={"images_per_task": 16})
        found.append(module.coefficients().detach())
    apart, moved = (found[0] - found[1]).abs().max().item(), (found[0] - 0.3).abs().max().item()
    record_property("difference", apart)
    record_property("moved", moved)
    assert apart < 0.05 * moved


def test_a_suite_is_held_in_bfloat16_and_in_a_file(suite_folder, tmp_path):
    exact = am.load_suite(str(suite_folder))
    rough = am.load_suite(str(suite_folder), dtype="bfloat16", banks=str(tmp_path))
    assert rough.task_vectors.vectors.dtype == torch.bfloat16 and rough.task_vectors.pretrained.dtype == torch.float32
    assert torch.equal(rough.task_vectors.vectors, exact.task_vectors.vectors.bfloat16())
    assert [path.name for path in tmp_path.glob("bank-*")] == [f"bank-{rough.task_vectors.fingerprint}.safetensors"]
    with pytest.raises(am.InputError, match="unknown dtype 'float16'"):
        am.load_suite(str(suite_folder), dtype="float16")


def test_a_kept_bank_is_written_once_and_never_another(bank, tmp_path):
    kept = kept_bank(bank, tmp_path)
    assert kept.fingerprints == bank.fingerprints and kept.tasks == bank.tasks
    (path,) = tmp_path.iterdir()
    written = path.stat().st_mtime_ns
    kept_bank(bank, tmp_path)
    assert path.stat().st_mtime_ns == written
    (bank * 2).save(path)
    with pytest.raises(am.InputError, match="another bank than its name says"):
        kept_bank(bank, tmp_path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(am.InputError, match="writes it anew"):
        kept_bank(bank, tmp_path)


def pages(name):
    """Kilobytes of a mapped file in this process, by kind of page."""
    found, inside = {}, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = name in line
        elif inside and (entry := re.match(r"(Rss|Shared_Clean|Private_Dirty|Anonymous): +(\d+) kB", line)):
            found[entry[1]] = found.get(entry[1], 0) + int(entry[2])
    return found


def hold(path, ready, told):
    """Load the bank in a process of its own, wait until the other one has it as well, and look at the pages."""
    bank = am.TaskVectors.load(path)
    os.write(ready, b"x")
    os.read(told, 1)
    bank.expert("a")
    found = pages("bank.safetensors")
    return 0 if found["Shared_Clean"] == found["Rss"] > 0 and found["Anonymous"] == 0 else 1


@pytest.mark.skipif(not MAPPED, reason="the pages of a process are in /proc/self/smaps on Linux alone")
def test_processes_share_the_pages_of_a_bank_file(tmp_path):
    size = 1 << 20
    vectors = torch.randn(3, size, generator=torch.Generator().manual_seed(0))
    bank = am.TaskVectors(("a", "b", "c"), Layout(("w",), ((size,),)), vectors[0].clone(), vectors, {})
    bank.save(tmp_path / "bank.safetensors")
    ready, tell = os.pipe(), os.pipe()
    other = start(hold, tmp_path / "bank.safetensors", ready[1], tell[0], log=tmp_path / "log")
    assert os.read(ready[0], 1) == b"x"
    ours = am.TaskVectors.load(tmp_path / "bank.safetensors")
    found = pages("bank.safetensors")
    os.write(tell[1], b"x")
    assert wait(other, 60) == 0, (tmp_path / "log").read_text()
    # The check against the fingerprint has read all of it, and copied nothing.
    assert found["Rss"] * 1024 >= ours.vectors.nbytes + ours.pretrained.nbytes
    assert found["Shared_Clean"] == found["Rss"] and found["Private_Dirty"] == found["Anonymous"] == 0


def test_a_streamed_bank_from_a_file_is_never_copied(toy, bank, heads, images, tmp_path):
    bank.save(tmp_path / "bank.safetensors")
    loaded = am.TaskVectors.load(tmp_path / "bank.safetensors")
    module = am.AdaMerging(loaded, toy, heads, bank="streamed")
    learned = fit(module, images, steps=3)[-1]
    merged = module.model.backbone.task_vectors
    assert merged.vectors.data_ptr() == loaded.vectors.data_ptr() and module.experts is loaded
    torch.testing.assert_close(learned, fit(am.AdaMerging(bank, Toy(), heads), images, steps=3)[-1], atol=1e-6, rtol=0)
