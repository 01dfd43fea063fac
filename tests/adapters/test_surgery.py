import pytest
import reference
import torch
from fitting import STEPS, fit
from torch.func import functional_call

import adaptive_merge as am
from adaptive_merge.adapters.surgery import surgery
from adaptive_merge.data.sampler import draw


def test_surgery_at_the_start_is_the_identity_bit_for_bit(toy, bank, heads, images):
    x = images["red"].take(torch.arange(9))
    plain = am.TaskArithmetic(bank, toy, heads).model("red", x)
    for recipe in (am.Surgery, am.SurgeryV2):
        operated = recipe(bank, toy, heads, rank=4).model("red", x)
        assert torch.equal(operated.features, plain.features) and torch.equal(operated.logits, plain.logits)


def test_down_gets_no_gradient_in_the_first_update():
    down, up = torch.randn(2, 6, requires_grad=True), torch.zeros(6, 2, requires_grad=True)
    surgery(torch.randn(5, 6), down, up).abs().sum().backward()
    assert down.grad.count_nonzero() == 0 and up.grad.count_nonzero() > 0


@pytest.mark.parametrize("schedule", ["joint", "shuffled"])
def test_updates_equal_the_published_loop(toy, bank, heads, images, experts, schedule):
    torch.manual_seed(1)
    module = am.Surgery(bank, toy, heads, rank=4)
    adapter = module.model.adapters[0]
    start = {
        task: [m[row].detach().clone().requires_grad_() for m in (adapter.down, adapter.up)]
        for row, task in enumerate(images)
    }
    merged = module.merged_state_dict()

    def features(weights, task, step):
        x = images[task].take(torch.from_numpy(draw(len(images[task]), 8, 0, task, step)))
        return functional_call(toy, weights, (reference.normalised(x),)).detach()

    reference.surgery(
        lambda t, s: features(merged, t, s), lambda t, s: features(experts[t], t, s), 4, start, list(images)
    )
    fit(module, images, steps=STEPS * (3 if schedule == "shuffled" else 1), stream={"schedule": schedule})
    for row, task in enumerate(images):
        for mine, theirs in zip((adapter.down, adapter.up), start[task]):
            torch.testing.assert_close(mine[row], theirs, rtol=1e-5, atol=1e-6)


def test_a_task_alone_leaves_the_others_bits(toy, bank, heads, images):
    for recipe in (am.Surgery, am.SurgeryV2, am.Tinting):
        module = recipe(bank, toy, heads, **({} if recipe is am.Tinting else {"rank": 2}))
        before = {name: value.clone() for name, value in module.model.adapters.state_dict().items()}
        fit(module, {"red": images["red"]}, steps=5)
        after = module.model.adapters.state_dict()
        rows = {name: int(name.rsplit(".", 1)[1]) // (2 if "block" in name else 1) for name in before}
        changed = {rows[name] for name in before if not torch.equal(before[name], after[name])}
        assert changed == {0}


def test_a_frozen_merge_asks_each_image_once(toy, bank, heads, images, monkeypatch):
    module = am.Surgery(bank, toy, heads, rank=2)
    forwarded = []
    run = type(module.model.backbone).forward
    monkeypatch.setattr(
        type(module.model.backbone), "forward", lambda self, x, *a: forwarded.append(len(x)) or run(self, x, *a)
    )
    fit(module, images, steps=60)
    assert sum(forwarded) == 2 * sum(len(source) for source in images.values())


def test_block_surgery_follows_the_tower_and_its_loss_reaches_every_block(toy, bank, heads, images):
    module = am.SurgeryV2(bank, toy, heads, rank=2)
    (adapter,) = module.model.adapters
    assert adapter.depth == 2 and adapter.block_down[0].shape == (2, 8)
    fit(module, images, steps=3)
    assert all(matrix.count_nonzero() for matrix in adapter.block_up)


def test_block_means_are_over_tokens_batch_first():
    import open_clip

    tower = open_clip.transformer.VisionTransformer(32, 8, 16, 3, 2, 2.0, output_dim=8)
    state = {name: value.detach() for name, value in tower.named_parameters()}
    bank = am.TaskVectors.from_state_dicts(state, {"a": state})
    module = am.SurgeryV2(bank, tower, {"a": torch.randn(4, 8)}, rank=2)
    x = torch.randn(5, 3, 32, 32)
    tokens = []
    hook = tower.transformer.resblocks[1].register_forward_hook(lambda _, __, out: tokens.append(out))
    tower.eval()(x)
    hook.remove()
    said = module.model("a", x, blocks=True)
    assert len(said.blocks) == 3
    torch.testing.assert_close(said.blocks[1], tokens[0].mean(1))


def test_block_surgery_starts_where_the_expert_distance_is_the_plain_one(toy, bank, heads, images, experts):
    """The summed loss of the first step against a straight computation with hooks on the plain backbone."""
    module = am.SurgeryV2(bank, toy, heads, rank=2)
    x = images["green"].take(torch.arange(6))

    def outputs(state):
        seen = []
        toy.load_state_dict(state)
        hooks = [block.register_forward_hook(lambda _, __, out: seen.append(out.detach())) for block in toy.blocks]
        features = toy(reference.normalised(x)).detach()
        for hook in hooks:
            hook.remove()
        return [features, *seen]

    expected = sum((a - b).abs().mean() for a, b in zip(outputs(module.merged_state_dict()), outputs(experts["green"])))
    expert = module.views.expert("green", {"image": x}, None, blocks=True)
    found = module.stage.objective.losses(module.model("green", x, blocks=True), expert).mean()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("rank", "message"), [(0, "at least 1"), (7, "larger than the 6 features")])
def test_impossible_ranks(toy, bank, heads, rank, message):
    with pytest.raises(am.InputError, match=message):
        am.Surgery(bank, toy, heads, rank=rank)


def test_unknown_tasks_are_named(toy, bank, heads):
    module = am.Surgery(bank, toy, heads, rank=2)
    with pytest.raises(am.InputError, match="no head for task 'rde'; did you mean 'red'"):
        module("rde", torch.zeros(1, 3, 4, 4))
