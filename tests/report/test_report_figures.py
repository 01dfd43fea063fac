import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest
from sample_runs import GROUPS, HOSTILE

from adaptive_merge.report import coefficient_figures, feature_figures, figures
from adaptive_merge.report.layers import depth, readable
from adaptive_merge.report.statistics import (
    half_width,
    independent_images,
    mean_and_deviation,
    paired_images,
    sign_flip_test,
    wilson,
)
from adaptive_merge.report.style import contrasting, luminance, span, to_array, to_svg

STEPS = np.arange(0, 50, 10)
RANDOM = np.random.default_rng(0)


def makers(tasks):
    size, values = len(tasks), RANDOM.random((len(STEPS), len(tasks), len(GROUPS)))
    scores = {task: {"n": 90, "pretrained": 0.4, "initial": 0.6, "adapted": 0.75, "individual": 0.9} for task in tasks}
    curves = {task: (np.arange(300), RANDOM.random(300)) for task in tasks}
    numbers = dict(zip(tasks, RANDOM.random(size)))
    clouds = {view: RANDOM.random((30, 5)) for view in ("individual", "initial", "adapted")}
    verdicts = (RANDOM.random(90), RANDOM.random(90) < 0.5)
    return {
        "heatmap": lambda: coefficient_figures.coefficient_heatmap(tasks, GROUPS, values[-1]),
        "heatmap task-wise": lambda: coefficient_figures.coefficient_heatmap(tasks, ["all"], values[-1][:, :1]),
        "trajectories": lambda: coefficient_figures.coefficient_trajectories(tasks, STEPS, values),
        "depth": lambda: coefficient_figures.depth_profile(tasks, GROUPS, values[-1], values[0]),
        "bars": lambda: figures.accuracy_bars(scores),
        "gap": lambda: figures.gap_recovered(scores),
        "curves": lambda: figures.adaptation_curves(curves, "entropy", (np.arange(300), RANDOM.random(300))),
        "prequential": lambda: figures.prequential_curves(curves, 0.6, 0.7),
        "resources": lambda: figures.resources(STEPS, RANDOM.random(5), 1e9 * RANDOM.random(5)),
        "compare bars": lambda: figures.compare_bars({tasks[0]: {task: [0.5, 0.6] for task in tasks}}),
        "compare means": lambda: figures.compare_means({task: ([0.5, 0.6], 0.02) for task in tasks}),
        "compare table": lambda: figures.compare_table({tasks[0]: {task: [0.5, 0.6] for task in tasks}}),
        "routes": lambda: feature_figures.route_matrix(tasks, RANDOM.random((size, size))),
        "compare curves": lambda: figures.compare_curves({task: [curve] for task, curve in curves.items()}, "loss"),
        "distance": lambda: feature_figures.representation_distance({"initial": numbers, "adapted": numbers}),
        "pca": lambda: feature_figures.projection(feature_figures.project_features(clouds), [0, 1, 2] * 10, "t"),
        "cosine": lambda: feature_figures.cosine_matrix(tasks, RANDOM.random((size, size))),
        "cross": lambda: feature_figures.cross_accuracy(tasks, RANDOM.random((size, size))),
        "reliability": lambda: feature_figures.reliability({"adapted": verdicts, tasks[0]: verdicts}),
    }


@pytest.mark.parametrize("name", makers(["a"]))
def test_figures_are_not_empty_and_keep_hostile_names_as_text(name):
    settings, tasks = dict(matplotlib.rcParams), list(HOSTILE)
    make = makers(tasks)[name]
    svg = to_svg(make(), "one")
    root = ElementTree.fromstring(svg.replace("<svg", '<svg xmlns:xlink="x"', 1))
    assert len(root.findall(".//path")) >= 2 and len(root.findall(".//text")) >= 3 and "viewBox" in root.attrib
    assert "<script" not in svg and "http" not in svg and "x" * 30 not in svg and "\u202e" not in svg
    assert all(found.startswith("one-") for found in re.findall(r'\bid="([^"]*)"', svg))
    pixels = to_array(make(), 50)
    assert pixels.dtype == np.uint8 and pixels.shape[2] == 3 and pixels.std() > 3
    assert settings == dict(matplotlib.rcParams)


def test_figures_leave_pyplot_alone():
    code = (
        "import sys; from adaptive_merge.report import coefficient_figures, feature_figures, figures, style; "
        "style.to_svg(figures.accuracy_bars({'a': dict.fromkeys(style.VIEW_NAMES, 0.5)}), 'f'); "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_figures_are_the_same_twice():
    make = makers(["a", "b"])["bars"]
    assert to_svg(make(), "f") == to_svg(make(), "f")


def test_layer_names_are_readable():
    names = [
        "visual.conv1.weight",
        *(
            f"visual.transformer.resblocks.{block}.{part}"
            for block in range(2)
            for part in ("attn.in_proj_weight", "mlp.c_fc.bias")
        ),
        "visual.ln_post.weight",
    ]
    assert readable(names) == ["conv1", "0 · qkv", "0 · mlp up bias", "1 · qkv", "1 · mlp up bias", "norm post"]
    assert depth(names) == (["stem", "0", "1", "end"], [0, 1, 1, 2, 2, 3])
    assert depth(["blocks.10.w", "blocks.2.w", "ln_post.bias", "stem"]) == (["2", "10", "end"], [1, 0, 2, 2])
    assert readable(["all"]) == ["all"] and readable(list(HOSTILE))


def test_gap_recovered_and_calibration_error():
    scores = {
        "half": {"individual": 0.9, "initial": 0.5, "adapted": 0.7},
        "none": {"individual": 0.5, "initial": 0.5, "adapted": 0.5},
    }
    assert figures.recovered(scores) == {"half": pytest.approx(0.5), "none": None}
    assert feature_figures.calibration_error(np.full(10, 0.8), np.array([1] * 6 + [0] * 4)) == pytest.approx(0.2)
    assert feature_figures.calibration_error(np.ones(4), np.ones(4)) == 0


def test_smoothing_keeps_the_mean_and_drops_nan():
    steps, values = figures.smooth((np.arange(600), np.ones(600)), 60)
    assert len(steps) == 60 and np.all(values == 1) and steps[0] == 4.5
    assert figures.smooth((np.arange(3), np.array([1, np.nan, 3])))[1].tolist() == [1, 3]


def test_tsne_projects_where_scikit_learn_is_there():
    pytest.importorskip("sklearn", reason="t-SNE needs the extra `report`")
    clouds = {name: RANDOM.random((12, 4)) for name in ("individual", "adapted")}
    plane = feature_figures.project_features(clouds, "tsne")
    assert {name: part.shape for name, part in plane.items()} == {"individual": (12, 2), "adapted": (12, 2)}


def test_sign_flip_test():
    assert sign_flip_test([0.1]) is None
    assert sign_flip_test([1.0] * 5) == 2 / 2**5
    assert sign_flip_test([1.0, -1.0]) == 1
    assert sign_flip_test([0.1] * 30) < 0.001
    assert mean_and_deviation([1, 3]) == (2, pytest.approx(2**0.5)) and mean_and_deviation([1])[1] is None


def test_intervals_of_shares():
    assert wilson(0.9, 100) == (pytest.approx(0.8256, abs=1e-4), pytest.approx(0.9448, abs=1e-4))  # Wilson, by hand
    assert wilson(1.0, 50)[1] == 1 and wilson(1.0, 50)[0] < 1 and wilson(0.3, 0) == (0.3, 0.3)
    one = {"a": {"n": 400, "adapted": 0.5}}
    assert half_width(one, "adapted") == pytest.approx(1.96 * 0.025, rel=0.01)
    two = one | {"b": one["a"]}
    assert half_width(two, "adapted") == pytest.approx(half_width(one, "adapted") / 2**0.5)


def test_pairs_of_images_are_tested_as_by_mcnemar():
    first, second = np.zeros(100), np.zeros(100)
    first[:4], second[4:20] = 1, 1  # 4 images lost, 16 gained: (16 - 4)^2 / (16 + 4) = 7.2
    test = paired_images({"a": first}, {"a": second})
    assert test.difference == pytest.approx(0.12) and (test.difference / test.error) ** 2 == pytest.approx(7.2)
    assert test.p == pytest.approx(0.00729, abs=1e-5) and test.significant and test.words == "paired over 100 images"
    assert not paired_images({"a": first}, {"a": second}, seeds=0.01).significant
    assert paired_images({"a": first}, {"a": first}).p == 1
    apart = independent_images({"a": {"n": 100, "adapted": 0.04}}, {"a": {"n": 100, "adapted": 0.16}})
    assert apart.words == "binomial, 100 images" and apart.error == pytest.approx(
        (0.04 * 0.96 + 0.16 * 0.84) ** 0.5 / 10, rel=0.06
    )


def test_print_is_read_on_every_colour():
    grounds = np.stack(np.meshgrid(*[np.linspace(0, 1, 12)] * 3), -1).reshape(-1, 3)
    for ground in grounds:
        light, dark = sorted((luminance(ground), 1.0 if contrasting(ground) == "#ffffff" else 0.0), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5
    assert span(np.array([0.2, np.nan, 0.7])) == (0.2, 0.7) and span(np.array([np.nan])) == (0, 1)
    low, high = span(np.ones(3))
    assert low < 1 < high
