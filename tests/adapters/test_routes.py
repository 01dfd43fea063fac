"""Routes: against the published loop, dense oracles and themselves in other batches."""

from __future__ import annotations

import pytest
import torch
from fitting import fit
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import adaptive_merge as am
from adaptive_merge.adapters import mixing
from adaptive_merge.adapters.mixing import mixed_product
from adaptive_merge.adapters.route import layers_of

TASKS = ("red", "green", "blue")


class Tower(nn.Module):
    """Two CLIP blocks of width 8 on four tokens and a class token: images [B, 3, 4, 4] → features [B, 6]."""

    def __init__(self):
        super().__init__()
        from open_clip.transformer import ResidualAttentionBlock

        self.stem, self.token = nn.Linear(12, 8), nn.Parameter(torch.randn(8))
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(8, 2, mlp_ratio=2.0) for _ in range(2))
        self.proj = nn.Parameter(torch.randn(8, 6) / 3)
        self.image_mean, self.image_std = (0.5,) * 3, (0.25,) * 3

    def forward(self, images):
        x = self.stem(images.reshape(len(images), 4, 12))
        x = torch.cat([self.token.expand(len(x), 1, 8), x], 1)
        for block in self.resblocks:
            x = block(x)
        return x[:, 0] @ self.proj


@pytest.fixture
def tower():
    torch.manual_seed(0)
    return Tower()


@pytest.fixture
def experts(tower):
    generator = torch.Generator().manual_seed(1)
    state = tower.state_dict()
    return {
        task: {name: value + 0.2 * torch.randn(value.shape, generator=generator) for name, value in state.items()}
        for task in TASKS
    }


@pytest.fixture
def build(tower, experts, heads):
    bank = am.TaskVectors.from_state_dicts(tower.state_dict(), experts)

    def make(adapter, coefficients=None, **settings):
        coefficients = coefficients or am.Fixed(0.3)
        return am.AdaptiveMerge(bank, tower, heads, coefficients=coefficients, adapters=[adapter], **settings)

    return make


def batch(images, count=3):
    return torch.cat([images[task].take(torch.arange(count)) for task in TASKS])


def routes():
    torch.manual_seed(3)
    return {
        "wemoe": am.WEMoE(),
        "e_wemoe": am.EWEMoE(0.5),
        "smile": am.SMILE(3, 2),
        "mass": am.MASS(rank=0.5),
        "twin": am.Twin(0.5, 8),
    }


def loud(module):
    """Gates that differ from image to image."""
    with torch.no_grad():
        for parameter in module.model.adapters.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) / 3)
    return module


@pytest.mark.parametrize("name", routes())
def test_a_prediction_does_not_depend_on_the_batch(build, images, name):
    module, x = loud(build(routes()[name])), batch(images)
    with torch.no_grad():
        whole, scores = module.model.shared_features(x), module.model.scores(len(x))
        alone = [(module.model.shared_features(one[None]), module.model.scores(1)) for one in x]
    assert not torch.allclose(scores[0], scores[5])
    torch.testing.assert_close(torch.cat([features for features, _ in alone]), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([one for _, one in alone]), scores, rtol=1e-5, atol=1e-5)
    assert module.predict(x)[0] == [module.predict(one[None])[0][0] for one in x]


@pytest.mark.parametrize("tokens", [(7, 5, 6), (7, 6), (0, 5, 6)])
def test_mixed_products_and_their_gradients_are_those_of_dense_weights(monkeypatch, tokens):
    monkeypatch.setitem(mixing.TILES, "cpu", (3, 3, 4))  # of seven images' matrices [4, 6]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, generator=generator, dtype=torch.float64).requires_grad_()
    gates = torch.randn(tokens[0], 3, generator=generator, dtype=torch.float64).requires_grad_()
    vectors = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 6, generator=generator, dtype=torch.float64).requires_grad_()
    dense = torch.einsum("bt,toi,b...i->b...o", gates, vectors, x) + x @ weight.T
    mixed = mixed_product(x, gates, vectors, weight)
    torch.testing.assert_close(mixed, dense)
    outer = torch.randn(mixed.shape, generator=generator, dtype=torch.float64)
    ours, oracle = (torch.autograd.grad((out * outer).sum(), (x, gates, weight)) for out in (mixed, dense))
    torch.testing.assert_close(ours, oracle)


def published_wemoe(tower, pretrained, vectors, heads, gates, stream, steps, lr):
    """The published loop: for each sample a state dict θ₀ + Σ λ τ of the MLP; entropy summed over tasks; Adam.

    Slips that are left out: `batch_reduce`, which averages λ over the batch and so makes it the task's.
    """
    merged = {name: value + 0.3 * sum(vector[name] for vector in vectors) for name, value in pretrained.items()}
    leaves = [[value.clone().requires_grad_() for value in gate] for gate in gates]
    optimizer = torch.optim.Adam([value for gate in leaves for value in gate], lr=lr)

    def features(images):
        x = F.linear(images.reshape(len(images), 4, 12), merged["stem.weight"], merged["stem.bias"])
        x = torch.cat([merged["token"].expand(len(x), 1, 8), x], 1)
        for index, (w1, b1, w2, b2) in enumerate(leaves):
            block, prefix = tower.resblocks[index], f"resblocks.{index}."
            own = {name.removeprefix(prefix): value for name, value in merged.items() if name.startswith(prefix)}
            x = x + functional_call(_Attention(block), {f"block.{k}": v for k, v in own.items()}, (x,))
            hidden = F.layer_norm(x, (8,), own["ln_2.weight"], own["ln_2.bias"])
            lam = F.linear(F.relu(F.linear(hidden, w1, b1)), w2, b2).mean(1)
            rows = []
            for sample, weights in zip(hidden, lam):
                state = {}
                for name in ("c_fc.weight", "c_fc.bias", "c_proj.weight", "c_proj.bias"):
                    full = f"{prefix}mlp.{name}"
                    state[name] = pretrained[full] + sum(w * vector[full] for w, vector in zip(weights, vectors))
                rows.append(functional_call(block.mlp, state, (sample,)))
            x = x + torch.stack(rows)
        return x[:, 0] @ merged["proj"]

    for step in range(steps):
        loss = 0.0
        for task, images in stream(step).items():
            x = (images.float() / 255 - 0.5) / 0.25
            logits = F.normalize(features(x), dim=-1) @ heads[task].T
            loss = loss - (logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return leaves


class _Attention(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block.attention(self.block.ln_1(x))


@pytest.mark.parametrize("accumulate", ["joint", "per_task"])
def test_the_first_twenty_updates_of_wemoe_are_those_of_the_published_loop(
    build, tower, experts, heads, images, accumulate
):
    torch.manual_seed(0)
    module = build(am.WEMoE(), lr=0.001, accumulate=accumulate)
    gates = [[value.detach().clone() for value in router.parameters()] for router in module.model.adapters[0].routers]
    for gate in gates:
        gate[3] += 0.3  # theirs are over θ₀, ours over the merge
    draws = am.TaskStream(images, 8).draws
    stream = lambda step: {task: images[task].take(index) for task, index in draws[step].items()}  # noqa: E731
    pretrained = {name: value.detach() for name, value in tower.state_dict().items()}
    vectors = [{name: experts[task][name] - value for name, value in pretrained.items()} for task in TASKS]
    fit_quietly(module, images)
    port = published_wemoe(tower, pretrained, vectors, heads, gates, stream, 20, 0.001)
    for router, start, gate in zip(module.model.adapters[0].routers, gates, port):
        ours = [value.detach() for value in router.parameters()]
        ours[3] = ours[3] + 0.3
        assert max((value - other).abs().max() for value, other in zip(ours, gate)) <= 1e-5
        assert (ours[3] - start[3]).abs().max() > 0.01


def fit_quietly(module, images, steps=20):
    import pytorch_lightning as pl

    silent = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = pl.Trainer(max_steps=steps, accelerator="cpu", enable_model_summary=False, **silent)
    trainer.fit(module, datamodule=am.TaskStream(images, 8))
    return trainer


def differences(module, experts, name):
    merged = module.model.backbone.merge()[name].double()
    return torch.stack([experts[task][name].double() - merged for task in TASKS])


def test_gates_of_smile_are_norms_in_each_experts_directions(build, experts, images):
    module = build(am.SMILE(rank=4, gate_rank=2), am.Fixed(0.0))
    adapter, x = module.model.adapters[0], batch(images)
    seen = {}
    site = "resblocks.0.mlp.c_fc"
    weights = module.model.backbone.merge()
    own = dict(adapter.sites(module.model.backbone, weights))
    edits = [(name, lambda inputs, output, edit=edit: edit(None, inputs, output)) for name, edit in own.items()]
    edits += [(site, lambda inputs, output: seen.update(x=inputs, y=output) or output)]
    with torch.no_grad():
        module.model.backbone(module.model.backbone.normalise(x), weights, edits)
    tokens, expected = seen["x"].double(), F.linear(seen["x"], weights[f"{site}.weight"], weights[f"{site}.bias"])
    expected = expected.double()
    parts = [torch.linalg.svd(matrix) for matrix in differences(module, experts, f"{site}.weight")]
    norms = torch.stack([(tokens @ vt[:2].T).norm(dim=-1) for _, _, vt in parts], -1)
    biases = differences(module, experts, f"{site}.bias")
    for place in [(0, 0), (4, 2), (8, 4)]:
        best = int(norms[place].argmax())
        u, s, vt = parts[best]
        expected[place] += u[:, :4] @ (s[:4] * (vt[:4] @ tokens[place])) + biases[best]
        torch.testing.assert_close(seen["y"][place].double(), expected[place], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("threshold", [0.2, 0.0, 0.99])
def test_mass_joins_the_experts_whose_directions_leave_the_smallest_residual(build, experts, images, threshold):
    module = build(am.MASS(blocks=[1], rank=0.5, threshold=threshold, most=2))
    adapter, x, seen = module.model.adapters[0], batch(images), {}
    site, backbone = "resblocks.1.mlp.c_fc", module.model.backbone
    weights = backbone.merge()
    with torch.no_grad():
        backbone(x, weights, [(site, lambda inputs, output: seen.update(x=inputs) or output)])
        adapter.look(backbone, x, weights)
    for token, joined, share in zip(seen["x"][:, 0].double(), adapter.joined, adapter.scores()):
        residuals = []
        for matrix in module.experts.of(f"{site}.weight").double():
            v = torch.linalg.svd(matrix)[2][:4].T
            residuals.append(torch.linalg.norm(token - v @ (v.T @ token)))
        r = torch.stack(residuals)
        score = torch.softmax(-(r - r.mean()) / (r.std(correction=0) + 1e-6), 0)
        torch.testing.assert_close(share.double(), score, rtol=1e-4, atol=1e-4)
        order = score.argsort(descending=True)
        kept = [int(order[0])] + [int(one) for one in order[1:2] if score[one] > threshold]
        expected = torch.zeros(3, dtype=torch.float64)
        expected[kept] = score[kept] / score[kept].sum()
        torch.testing.assert_close(joined.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_second_look_of_mass_is_the_joined_experts_over_the_pretrained_model(build, experts, tower, images):
    module, x = build(am.MASS(rank=1.0, most=2, threshold=0.1)), batch(images)
    adapter, backbone = module.model.adapters[0], module.model.backbone
    with torch.no_grad():
        features = module.model.shared_features(x)
        for image, joined, found in zip(x, adapter.joined, features):
            weights = dict(backbone.merge())
            for layer in layers_of(backbone, attention=True):
                for name in (layer.weight, layer.bias):
                    start = tower.state_dict()[name]
                    weights[name] = start + sum(g * (experts[t][name] - start) for g, t in zip(joined, TASKS))
            torch.testing.assert_close(found, backbone(image[None], weights)[0], rtol=1e-4, atol=1e-4)
    assert {int((row > 0).sum()) for row in adapter.joined} == {2}


def test_twin_at_full_rank_and_a_sure_router_is_the_expert_in_all_matrices(build, experts, images):
    module, x = build(am.Twin(rank=1.0, hidden=4)), batch(images)
    with torch.no_grad():
        last = module.model.adapters[0].router[3]
        last.weight.zero_()
        last.bias.copy_(torch.tensor([-100.0, 100.0, -100.0]))
    backbone, weights = module.model.backbone, dict(module.model.backbone.merge())
    for layer in layers_of(backbone, attention=True):
        weights |= {name: experts["green"][name] for name in (layer.weight, layer.bias)}
    torch.testing.assert_close(module.model.shared_features(x), backbone(x, weights), rtol=1e-4, atol=1e-4)
    assert module.predict(x)[0] == ["green"] * 9


def test_twins_exclusive_knowledge_has_the_leading_singular_values(build, experts):
    module = build(am.Twin(rank=0.25))
    for layer in layers_of(module.model.backbone, attention=True):
        full = differences(module, experts, layer.weight)
        left, right = (module.model.adapters[0].frozen[f"{layer.weight}.{side}"].double() for side in ("left", "right"))
        values = torch.linalg.svdvals(full)
        kept = right.shape[1]
        assert kept == min(full.shape[1:]) // 4
        residual = torch.linalg.matrix_norm(full - left @ right)
        torch.testing.assert_close(residual, values[:, kept:].norm(dim=1), rtol=1e-4, atol=1e-5)


def test_the_stream_teaches_twin_which_task_an_image_is_of(build, images):
    marked = {
        task: am.Images(torch.full((24, 4, 4, 3), 80 * row, dtype=torch.uint8), part.labels[:24], part.classes)
        for row, (task, part) in enumerate(images.items())
    }
    module = build(am.Twin(0.5, 16), objective=am.Stream(), lr=0.02, task="unknown")
    trainer = fit_quietly(module, marked, steps=60)
    found = am.evaluate(trainer, module, am.TaskStream(marked, 8))["adapted"]
    assert all(row["routing"] == 1.0 and row["accuracy"] == row["known"] == row["unknown"] for row in found.values())


def test_an_image_sent_elsewhere_counts_as_wrong(build, images):
    module = loud(build(am.WEMoE(), task="unknown"))
    stream = am.TaskStream(images, 8)
    found = am.evaluate(_trainer(), module, stream)["adapted"]
    for row, (task, part) in enumerate(images.items()):
        x = part.take(torch.arange(len(part)))
        named, classes = module.predict(x)
        here = torch.tensor([name == task for name in named])
        right = module(task, x).argmax(1) == part.labels
        assert found[task]["routing"] == pytest.approx(here.float().mean().item())
        assert found[task]["accuracy"] == pytest.approx((here & right).float().mean().item())
        assert found[task]["known"] == pytest.approx(right.float().mean().item())
        assert [int(one) for one, own in zip(classes, here) if own] == module(task, x).argmax(1)[here].tolist()
        assert row < 3
    assert 0 < sum(row["routing"] for row in found.values()) < 3


def _trainer():
    import pytorch_lightning as pl

    silent = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    return pl.Trainer(accelerator="cpu", enable_model_summary=False, **silent)


def test_what_needs_the_task_is_refused_by_name(build, images):
    with pytest.raises(am.InputError, match="recipe 'surgery' needs the task's name to predict: it has no route"):
        build(am.FeatureSurgery(2), recipe="surgery", task="unknown")
    with pytest.raises(am.InputError, match="its BlockSurgery changes the tower task by task"):
        module = build(am.WEMoE())
        parts = (module.experts, Tower(), dict(module.model.heads))
        am.AdaptiveMerge(*parts, adapters=[am.WEMoE(), am.BlockSurgery(2)], task="unknown")
    with pytest.raises(am.InputError, match="task is 'known'"):
        build(am.WEMoE(), task="no")
    with pytest.raises(am.InputError, match="needs the task's name"):
        build(am.FeatureSurgery(2)).predict(batch(images))
    with pytest.raises(am.InputError, match="with the task unknown, the protocol 'online'"):
        fit(build(am.WEMoE(), task="unknown"), images, steps=1, stream={"protocol": am.Online()})
    with pytest.raises(am.InputError, match="merge that stays as it is"):
        build(am.SMILE(3, 2), am.LayerWise(0.3))
    with pytest.raises(am.InputError, match="Stream teaches a route"):
        fit(build(am.FeatureSurgery(2), objective=am.Stream()), images, steps=1)


@pytest.mark.parametrize("name", ["wemoe", "e_wemoe", "twin"])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(build, images, tmp_path, name):
    import pytorch_lightning as pl

    def run(steps, checkpoint=None):
        objective = am.Stream() if name == "twin" else am.Entropy()
        module = build(routes()[name], objective=objective, lr=0.01)
        silent = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
        trainer = pl.Trainer(max_steps=steps, accelerator="cpu", enable_model_summary=False, **silent)
        trainer.fit(module, datamodule=am.TaskStream(images, 4), ckpt_path=checkpoint, weights_only=True)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return module.state_dict()

    whole, start = run(4), build(routes()[name]).state_dict()
    run(2)
    resumed = run(4, tmp_path / "2.ckpt")
    assert whole.keys() == resumed.keys() and all(torch.equal(value, resumed[key]) for key, value in whole.items())
    assert any(not torch.equal(value, start[key]) for key, value in whole.items())
    assert sum(value.numel() for value in whole.values()) < 600  # no factor, no task vector
