"""RegMean, RegMean++, LOT and FeatCal against straight ports: dense loops over a tower written out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import TASKS, bank_of, images_of, small_vit

from adaptive_merge.starts.mats import MaTS
from adaptive_merge.starts.regmean import LOT, RegMean, RegMeanPP
from adaptive_merge.starts.regression import CompensatedRegression, FeatCal

LAYERS = ("attn.in_proj_", "attn.out_proj.", "mlp.c_fc.", "mlp.c_proj.")
NORMS = ("ln_1.", "ln_2.")


def embed(w, images):
    x = F.conv2d(images, w["conv1.weight"], stride=4).flatten(2).transpose(1, 2)
    x = torch.cat([w["class_embedding"].expand(len(x), 1, -1), x], 1) + w["positional_embedding"]
    return F.layer_norm(x, (16,), w["ln_pre.weight"], w["ln_pre.bias"])


def block(w, index, stream):
    """The stream after a block, and each layer's input (of a norm: normalised only)."""
    p = f"transformer.resblocks.{index}."
    x = {}

    def norm(name, value):
        x[name] = F.layer_norm(value, (16,))
        return x[name] * w[p + name + "weight"] + w[p + name + "bias"]

    def linear(name, value):
        x[name] = value
        return value @ w[p + name + "weight"].T + w[p + name + "bias"]

    q, k, v = linear(LAYERS[0], norm("ln_1.", stream)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    attention = ((q @ k.transpose(-1, -2)) / 8**0.5).softmax(-1) @ v
    stream = stream + linear(LAYERS[1], attention.transpose(1, 2).flatten(2))
    stream = stream + linear(LAYERS[3], F.gelu(linear(LAYERS[2], norm("ln_2.", stream))))
    return stream, x


def class_token(w, stream):
    return F.layer_norm(stream[:, 0], (16,), w["ln_post.weight"], w["ln_post.bias"])


@pytest.fixture
def setting():
    bank, images = bank_of(small_vit()), {task: pixels.double() for task, pixels in images_of().items()}
    experts = {task: {name: value.double() for name, value in bank.expert(task).items()} for task in TASKS}
    return bank, images, experts


def double(bank, flat):
    return {name: value.double().clone() for name, value in bank.layout.unflatten(flat).items()}


def flat(merged, bank):
    return torch.cat([merged[name].flatten() for name in bank.names])


def gram(x):
    x = x.reshape(-1, x.shape[-1])
    return x.T @ x / len(x)


def shrunk(matrix, factor):
    return factor * matrix + (1 - factor) * matrix.diag().diag()


def weigh(grams, weights, factor):
    """(Σ G̃)⁻¹ Σ G̃ W for W [in, out]."""
    grams = [shrunk(matrix, factor) for matrix in grams]
    return torch.linalg.inv(sum(grams)) @ sum(g @ w for g, w in zip(grams, weights))


def close(solved, expected):
    assert (solved.double() - expected).norm() / expected.norm() < 1e-5


def test_regmean(make_problem, setting):
    bank, images, experts = setting
    merged = double(bank, bank.pretrained + bank.vectors.mean(0))
    streams = {task: embed(experts[task], images[task]) for task in TASKS}
    for index in range(2):
        inputs = {}
        for task in TASKS:
            streams[task], inputs[task] = block(experts[task], index, streams[task])
        for layer in LAYERS:
            name = f"transformer.resblocks.{index}.{layer}weight"
            weights = [experts[task][name].T for task in TASKS]
            merged[name] = weigh([gram(inputs[task][layer]) for task in TASKS], weights, 0.9).T
    tokens = [gram(class_token(experts[task], streams[task])) for task in TASKS]
    merged["proj"] = weigh(tokens, [experts[task]["proj"] for task in TASKS], 0.9)
    close(RegMean(0.9).solve(make_problem()).weights, flat(merged, bank))


def test_regmean_pp(make_problem, setting):
    bank, images, experts = setting
    merged = double(bank, bank.pretrained + bank.vectors.mean(0))
    streams = {task: embed(merged, images[task]) for task in TASKS}
    for index in range(2):
        inputs = {task: block(experts[task], index, streams[task])[1] for task in TASKS}
        for layer in LAYERS:
            name = f"transformer.resblocks.{index}.{layer}weight"
            weights = [experts[task][name].T for task in TASKS]
            merged[name] = weigh([gram(inputs[task][layer]) for task in TASKS], weights, 0.95).T
        streams = {task: block(merged, index, streams[task])[0] for task in TASKS}
    tokens = [gram(class_token(experts[task], streams[task])) for task in TASKS]
    merged["proj"] = weigh(tokens, [experts[task]["proj"] for task in TASKS], 0.95)
    close(RegMeanPP(0.95).solve(make_problem()).weights, flat(merged, bank))


def test_lot(make_problem, setting):
    bank, images, experts = setting
    base = double(bank, bank.pretrained)
    merged = double(bank, bank.pretrained + 1.2 * bank.vectors.mean(0))
    streams = {task: embed(experts[task], images[task]) for task in TASKS}

    def solve(name, inputs):
        grams = [gram(x) for x in inputs]
        moved = [(experts[task][name] - base[name]) for task in TASKS]
        moved = [value if name == "proj" else value.T for value in moved]
        tau = torch.linalg.pinv(sum(grams)) @ sum(g @ v for g, v in zip(grams, moved))
        merged[name] = base[name] + 1.2 * (tau if name == "proj" else tau.T)

    def scale(name, inputs):
        squares = [(z**2).flatten(0, -2).mean(0) for z in inputs]
        tau = sum(s * (experts[task][name] - base[name]) for s, task in zip(squares, TASKS)) / sum(squares)
        merged[name] = base[name] + 1.2 * tau

    for index in range(2):
        inputs = {}
        for task in TASKS:
            streams[task], inputs[task] = block(experts[task], index, streams[task])
        for layer in LAYERS:
            solve(f"transformer.resblocks.{index}.{layer}weight", [inputs[task][layer] for task in TASKS])
        for norm in NORMS:
            scale(f"transformer.resblocks.{index}.{norm}weight", [inputs[task][norm] for task in TASKS])
    scale("ln_post.weight", [F.layer_norm(streams[task][:, 0], (16,)) for task in TASKS])
    solve("proj", [class_token(experts[task], streams[task]) for task in TASKS])
    close(LOT(1.2).solve(make_problem()).weights, flat(merged, bank))


def token_weights(index, part):
    """FeatCal: in the last block other tokens weigh .01, except where they feed keys and values."""
    weights = torch.ones(5, dtype=torch.float64)
    if index == 1 and part not in ("kv", "ln_1."):
        weights[1:] = 0.01
    return weights / weights.sum()


def mean(values, weights):
    """Mean over images and, weighted, over tokens."""
    return torch.einsum("bn...,n->...", values, weights) / len(values)


def featcal_linear(student, expert, layers, anchor, weights, strength, alpha):
    left, right, bias, share = strength * torch.eye(student[0].shape[-1]).double(), strength * anchor[0].T, 0.0, 0.0
    means = []
    for xs, xe, (w, b) in zip(student, expert, layers):
        xt = alpha * xe + (1 - alpha) * xs
        c = mean(xs[..., :, None] * xs[..., None, :], weights)
        k = mean(xs[..., :, None] * xt[..., None, :], weights)
        n = c.norm()
        left, right = left + c / n, right + k @ w.T / n
        means.append((mean(xs, weights), mean(xt, weights), n, w, b))
    weight = torch.linalg.solve(left, right).T
    for xs, xt, n, w, b in means:
        bias, share = bias + (b + w @ xt - weight @ xs) / n, share + 1 / n
    return weight, (bias + strength * anchor[1]) / (share + strength)


def featcal_norm(student, layers, anchor, weights, strength):
    square = [mean(z**2, weights) for z in student]
    first = [mean(z, weights) for z in student]
    a, b, d = sum(square) + strength, sum(first), len(layers) + strength
    u = sum(s * g + f * h for s, f, (g, h) in zip(square, first, layers)) + strength * anchor[0]
    v = sum(f * g + h for f, (g, h) in zip(first, layers)) + strength * anchor[1]
    determinant = (a * d - b**2).clamp_min(1e-8)
    return (d * u - b * v) / determinant, (a * v - b * u) / determinant


def test_featcal(make_problem, setting):
    bank, images, experts = setting
    problem, strength, rho = make_problem(), 0.05, 1.3
    merged = double(bank, problem.anchor)
    anchor = double(bank, rho * problem.anchor + (1 - rho) * bank.pretrained)
    mine = {task: embed(merged, images[task]) for task in TASKS}
    theirs = {task: embed(experts[task], images[task]) for task in TASKS}
    for index in range(2):
        student = {task: block(merged, index, mine[task])[1] for task in TASKS}
        expert = {task: block(experts[task], index, theirs[task])[1] for task in TASKS}

        def layer(w, name, rows):
            p = f"transformer.resblocks.{index}.{name}"  # noqa: B023
            return w[p + "weight"][rows], w[p + "bias"][rows]

        solved = {}
        for name in (*LAYERS, *NORMS):
            parts = {"q": slice(0, 16), "kv": slice(16, 48)} if name == LAYERS[0] else {name: slice(None)}
            for part, rows in parts.items():
                layers = [layer(experts[task], name, rows) for task in TASKS]
                common = (layers, layer(anchor, name, rows), token_weights(index, part), strength)
                xs = [student[task][name] for task in TASKS]
                if name in NORMS:
                    solved[part] = featcal_norm(xs, *common)
                else:
                    solved[part] = featcal_linear(xs, [expert[task][name] for task in TASKS], *common, 0.25)
        solved[LAYERS[0]] = tuple(torch.cat(halves) for halves in zip(solved.pop("q"), solved.pop("kv")))
        for name, (weight, bias) in solved.items():
            merged[f"transformer.resblocks.{index}.{name}weight"] = weight
            merged[f"transformer.resblocks.{index}.{name}bias"] = bias
        mine = {task: block(merged, index, mine[task])[0] for task in TASKS}
        theirs = {task: block(experts[task], index, theirs[task])[0] for task in TASKS}
    close(FeatCal(strength, 0.25, rho).solve(problem).weights, flat(merged, bank))


def test_conjugate_gradients_on_grams_lead_to_regmean(make_problem, setting):
    bank, _, _ = setting
    anchor = bank.pretrained + bank.vectors.mean(0)
    matched = MaTS("gram", 2000).solve(make_problem(anchor=anchor)).weights
    expected = RegMean(1.0).solve(make_problem()).weights
    assert (matched - expected).norm() / expected.norm() < 1e-4


def test_the_compensated_targets_bring_the_stream_back(make_problem, setting):
    bank, images, experts = setting
    problem = make_problem()

    def lost(start):
        merged = double(bank, start.solve(problem).weights)
        total = 0.0
        for task in TASKS:
            mine, own = embed(merged, images[task]), embed(experts[task], images[task])
            for index in range(2):
                mine, own = block(merged, index, mine)[0], block(experts[task], index, own)[0]
            total += float((mine[:, 0] - own[:, 0]).norm())
        return total

    assert lost(CompensatedRegression(0.01)) < lost(CompensatedRegression(0.01, compensation=0.0))
