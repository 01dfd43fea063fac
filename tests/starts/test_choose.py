"""Settings chosen without labels, the start that chooses, Fisher merging, and wrong settings."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conftest import bank_of, heads_of, images_of
from torch import nn

from adaptive_merge.adapters.heads import Head, LinearHead
from adaptive_merge.errors import InputError
from adaptive_merge.starts.choose import NOISE, ChosenRegression, choose
from adaptive_merge.starts.fisher import Fisher
from adaptive_merge.starts.mats import MaTS
from adaptive_merge.starts.predictions import heads_of as heads_of_problem
from adaptive_merge.starts.regmean import LOT, RegMean
from adaptive_merge.starts.regression import CompensatedRegression, FeatCal
from adaptive_merge.starts.store import FileStore

ROUNDS = [[{"strength": 1e-3}, {"strength": 1e3}], [{"mixing": 0.0}]]


def test_the_choice_is_the_smallest_divergence_in_its_table(make_problem):
    choice = choose(make_problem(), CompensatedRegression(1.0), ROUNDS)
    assert len(choice.table) == 3
    smallest = min(row.agreement.divergence for row in choice.table)
    chosen = next(row for row in choice.table if row.start == choice.start)
    # Of several rounds the last but for what is no better than noise.
    assert smallest <= chosen.agreement.divergence <= smallest / (1 - NOISE / 144**0.5)
    assert choice.start.strength != 1e3
    assert all(0 <= row.agreement.share <= 1 for row in choice.table)


def test_the_choice_does_not_depend_on_batches(make_problem):
    first, second = (
        choose(make_problem(batch=batch), CompensatedRegression(1.0), [[{"mixing": 0.5}]]) for batch in (15, 48)
    )
    for one, other in zip(first.table, second.table):
        assert one.agreement == pytest.approx(other.agreement, abs=1e-3)


def test_what_is_judged_on_is_not_solved_from(make_problem, monkeypatch):
    used = []

    def solve(self, problem):
        used.append({task: torch.cat(list(batches)) for task, batches in problem.images.items()})
        return original(self, problem)

    original = RegMean.solve
    monkeypatch.setattr(RegMean, "solve", solve)
    choose(make_problem(), RegMean(0.9), [], held_out=0.25)
    # 48 images a task are few: each quarter is held out in its turn.
    assert [len(images["red"]) for images in used] == [36] * 4
    left = torch.stack([images["red"].sum() for images in used])
    assert torch.isclose(left.sum(), 3 * images_of()["red"].sum(), rtol=1e-4)


def test_a_start_that_chooses_ends_with_all_images(make_problem, tmp_path):
    problem = make_problem(images=images_of(count=8), store=FileStore(tmp_path / "start.safetensors"))
    solution = ChosenRegression().solve(problem)
    alone = solution.choice.start.solve(make_problem(images=images_of(count=8)))
    assert torch.equal(solution.weights, alone.weights)


def test_a_choice_that_was_stopped_goes_on_and_reports_all_walks(make_problem, tmp_path):
    images = images_of(count=8)
    calls, walks, last = [], 8 * 4 + 1, 0
    whole = ChosenRegression().solve(make_problem(images=images, progress=lambda *call: calls.append(call)))
    assert calls == [(done, len(calls)) for done in range(1, len(calls) + 1)]
    blocks = len(calls) // walks
    assert len(calls) == walks * blocks
    # In the first walk, between two, in the last but one, and in the final solve.
    for stop in (2, blocks, len(calls) - blocks - 3, len(calls) - 2):

        def report(done, total, stop=stop):
            nonlocal last
            assert done == last + 1 and total == len(calls)
            last = done
            if done == stop:
                last = (done - 1) // blocks * blocks  # those of a walk under way are reported again
                raise KeyboardInterrupt

        store = FileStore(tmp_path / "start.safetensors")
        with pytest.raises(KeyboardInterrupt):
            ChosenRegression().solve(make_problem(images=images, store=store, progress=report))
    resumed = ChosenRegression().solve(make_problem(images=images, store=store, progress=partial(report, stop=0)))
    assert torch.equal(resumed.weights, whole.weights)
    assert resumed.choice.start.settings == whole.choice.start.settings


def test_a_choice_needs_two_images_a_task_and_heads(make_problem):
    with pytest.raises(InputError, match="one image"):
        choose(make_problem(images=images_of(count=1)), RegMean(), [])
    with pytest.raises(InputError, match="task 'red' has an expert but no head"):
        choose(make_problem(heads={}), RegMean(), [])
    with pytest.raises(InputError, match="`held_out`"):
        ChosenRegression(held_out=0.7)


class Halves(Head):
    """Two units an image: each half of the features has logits of its own."""

    def __init__(self, weight):
        super().__init__(len(weight), 2 * weight.shape[1])
        self.weight = nn.Parameter(weight)

    def logits(self, features):
        return nn.functional.linear(features.unflatten(1, (2, -1)), self.weight).flatten(0, 1)


@pytest.mark.parametrize("kind", ["units", "linear"])
def test_any_head_will_do(make_problem, kind):
    weights = {task: torch.randn(4, 3 if kind == "units" else 6) for task in ("red", "green", "blue")}
    heads = {task: Halves(weight) if kind == "units" else LinearHead(weight) for task, weight in weights.items()}
    problem = make_problem(images=images_of(count=8), heads=heads, batch=3)
    (judged,) = choose(problem, CompensatedRegression(1e9), []).table
    shares = []
    for task, pixels in images_of(count=8).items():
        models = problem.experts.layout.unflatten(problem.anchor), problem.experts.expert(task)
        merged, own = (heads[task](torch.func.functional_call(problem.backbone, m, (pixels,))) for m in models)
        shares.append((merged.argmax(-1) == own.argmax(-1)).float().mean())
    assert judged.agreement.share == pytest.approx(float(torch.stack(shares).mean()))
    for method in (Fisher(), MaTS("block", 2, samples=None), MaTS("block", 2)):
        assert torch.isfinite(method.solve(problem).weights).all()


def test_fisher_of_units_is_the_sum_over_them(make_problem):
    weight = torch.randn(4, 3)
    twice = torch.cat([weight, torch.zeros_like(weight)], 1), torch.cat([torch.zeros_like(weight), weight], 1)
    parts = [dict.fromkeys(("red", "green", "blue"), head) for head in (Halves(weight), *map(LinearHead, twice))]
    squares = []
    for heads in parts:
        problem = linear_problem(make_problem, heads=heads)
        squares.append(information(Fisher(floor=1e-12), problem, "red"))
    assert torch.allclose(squares[0], squares[1] + squares[2], rtol=1e-4)


def information(start, problem, task):
    return start._information(problem.backbone, heads_of_problem(problem)[task], problem, task)


def linear_problem(make_problem, **parts):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(192, 6, bias=False))
    return make_problem(backbone=backbone, experts=bank_of(backbone), images=images_of(count=6), **parts)


def test_fisher_is_the_expected_square_of_the_gradient(make_problem):
    problem = linear_problem(make_problem)
    bank, heads, images = problem.experts, heads_of(), images_of(count=6)
    weighted, total = 0.0, 0.0
    for task in bank.tasks:
        weight, information = bank.expert(task)["1.weight"], 1e-6
        for image in images[task]:

            def log(w, image=image, task=task):
                return (nn.functional.normalize(w @ image.flatten(), dim=0) @ heads[task].T).log_softmax(0)

            jacobian, p = torch.func.jacrev(log)(weight), log(weight).exp()
            information = information + torch.einsum("c,c...->...", p, jacobian**2) / 6
        weighted, total = weighted + information * weight, total + information
    assert torch.allclose(Fisher().solve(problem).weights, (weighted / total).flatten(), atol=1e-5)


def test_equal_information_gives_the_mean(make_problem):
    bank = linear_problem(make_problem).experts
    solved = Fisher(floor=1e12).solve(linear_problem(make_problem)).weights
    assert torch.allclose(solved, bank.pretrained + bank.vectors.mean(0), atol=1e-5)


def test_drawn_labels_come_near_to_the_expectation(make_problem):
    drawn, exact = (Fisher(samples).solve(linear_problem(make_problem)).weights for samples in (300, None))
    assert (drawn - exact).norm() < 0.1 * exact.norm()


def test_fisher_and_the_block_form_of_mats_need_heads(make_problem):
    for method in (Fisher(), MaTS("block")):
        with pytest.raises(InputError, match="no head"):
            method.solve(make_problem(heads={}))


@pytest.mark.parametrize(
    "make",
    [
        lambda: CompensatedRegression(0.0),
        lambda: CompensatedRegression(0.1, mixing=1.5),
        lambda: FeatCal(mixing=-1),
        lambda: RegMean(2.0),
        lambda: LOT(0.0),
        lambda: MaTS("diagonal"),
        lambda: MaTS(iterations=0),
        lambda: MaTS(shrink=-1),
        lambda: Fisher(0),
        lambda: Fisher(floor=0),
    ],
)
def test_wrong_settings_are_named(make):
    with pytest.raises(InputError, match="`"):
        make()


def test_an_anchor_of_another_size_and_a_task_without_a_stream_are_named(make_problem):
    with pytest.raises(InputError, match="`anchor` has shape"):
        make_problem(anchor=torch.zeros(3))
    with pytest.raises(InputError, match="`images` has none for task 'blue'"):
        make_problem(images=images_of(("red", "green")))


def test_a_damaged_store_is_named(make_problem, tmp_path):
    path = tmp_path / "start.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(InputError, match="delete it"):
        RegMean().solve(make_problem(store=FileStore(path)))


def test_settings_are_the_constructors_arguments():
    assert repr(FeatCal(0.1)) == "FeatCal(strength=0.1, mixing=0.25, extrapolation=1.0, other_tokens=0.01)"
    assert ChosenRegression(0.2).settings == {"held_out": 0.2, "seed": 0}
