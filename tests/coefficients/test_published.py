"""Published coefficients, named by `init`, land on the right tensors; what is no file of coefficients is refused."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from weights.checkpoint_helpers import write

import adaptive_merge as am
from adaptive_merge.__main__ import main
from adaptive_merge.coefficients.files import load_coefficients
from adaptive_merge.weights.huggingface import from_huggingface
from adaptive_merge.weights.open_clip_names import expected_shapes, parameter_names

EIGHT = ["SUN397", "Cars", "RESISC45", "EuroSAT", "SVHN", "GTSRB", "MNIST", "DTD"]
ROWS = len(parameter_names(2))  # 32 of the tower alone, 38 with the dead ones of the text tower


def bank_of(tasks, *, still=(), width=4, patch=2, layers=2):
    """Experts of a tiny tower under open_clip's names; `still` has a task vector of zero."""
    sizes = {"patch": patch, "image_size": 2 * patch, "mlp_width": 8, "embed_dim": 3}
    shapes = expected_shapes(width=width, layers=layers, **sizes)
    base = {name: torch.zeros(shape) for name, shape in shapes.items()}
    moved = {name: value if name in still else value + 1 for name, value in base.items()}
    return am.TaskVectors.from_state_dicts(base, dict.fromkeys(tasks, moved))


def start(path, tasks, kind=am.LayerWise, **sizes):
    """{task: {group: λ}} as the coefficients start."""
    return kind(init=str(path)).bind(bank_of(tasks, **sizes)).table()


def table(rows: int, tasks: int, *, leading: bool) -> list[list[float]]:
    """Every λ tells its row and column."""
    return [[1.0] * leading + [row / 100 + column / 10000 for column in range(tasks)] for row in range(rows)]


def save_table(folder, rows, suffix):
    path = folder / f"table{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(rows))
        return path
    return write(torch.tensor(rows, dtype=torch.float64), path, "zip")


@pytest.mark.parametrize("suffix", [".json", ".pt"])
@pytest.mark.parametrize("leading", [True, False])
@pytest.mark.parametrize(("rows", "first"), [(ROWS + 6, 3), (ROWS, 0)])
def test_rows_land_on_their_tensors_and_text_rows_are_dropped(tmp_path, rows, first, leading, suffix):
    found = start(save_table(tmp_path, table(rows, 3, leading=leading), suffix), ["a", "b", "c"])
    names = parameter_names(2)
    assert [found["b"][name] for name in names] == pytest.approx([(first + i) / 100 + 1e-4 for i in range(ROWS)])


def test_the_rows_of_the_published_layout_one_by_one(tmp_path):
    found = start(save_table(tmp_path, table(158, 1, leading=True), ".pt"), ["a"], layers=12)["a"]
    expected = {
        "class_embedding": 3,
        "positional_embedding": 4,
        "proj": 5,
        "conv1.weight": 6,
        "ln_pre.weight": 7,
        "transformer.resblocks.0.ln_1.weight": 9,
        "transformer.resblocks.6.mlp.c_proj.bias": 9 + 12 * 7 - 1,
    }
    assert {name: 100 * found[name] for name in expected} == pytest.approx(expected)


def test_columns_without_names_are_the_published_eight_in_their_order(tmp_path):
    path = save_table(tmp_path, table(ROWS, 8, leading=True), ".json")
    found = start(path, list(reversed(EIGHT)))
    assert [found[task]["class_embedding"] for task in EIGHT] == pytest.approx([i / 10000 for i in range(8)])
    others = [f"task {index}" for index in range(8)]
    assert list(start(path, others)) == others
    with pytest.raises(am.InputError, match="this merge has no task 'SUN397'"):
        start(path, EIGHT[1:])


def test_task_wise_rows_fit_task_wise_coefficients_and_spread_over_layers(tmp_path):
    path = save_table(tmp_path, [[1.0, 0.25, 0.5]], ".json")
    assert start(path, ["a", "b"], am.TaskWise) == {"a": {"all": 0.25}, "b": {"all": 0.5}}
    assert start(path, ["a", "b"])["b"] == dict.fromkeys(parameter_names(2), 0.5)
    single = write(torch.tensor([0.25, 0.5]), tmp_path / "merging_weights.pt", "zip")
    assert start(single, ["a", "b"], am.Fixed) == {"a": {"all": 0.25}, "b": {"all": 0.5}}
    layers = save_table(tmp_path, table(ROWS, 2, leading=True), ".json")
    with pytest.raises(am.InputError, match="no coefficient for group 'all'"):
        start(layers, ["a", "b"], am.TaskWise)


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (ROWS, 7, r"expected 3 columns, one per task \(a, b, c\)"),
        (199, 3, "fusion_bench's tables have"),
        (ROWS - 2, 3, "30 rows, expected"),
        (0, 0, "expected a table"),
    ],
)
def test_tables_of_another_shape_are_refused(tmp_path, rows, columns, message):
    with pytest.raises(am.InputError, match=message):
        start(save_table(tmp_path, table(rows, columns, leading=False), ".json"), list("abc"))


def test_a_first_column_that_is_not_one_is_not_taken_for_the_pretrained_one(tmp_path):
    with pytest.raises(am.InputError, match="one more, all 1"):
        start(save_table(tmp_path, table(ROWS, 4, leading=False), ".json"), list("abc"))


SOURCE = """
import os
def get_merging_cofficients(method, model):
    os.system('touch {target}')
    if method in ['task_arithmetic', 'ties_merging']:
        ralpha = [[1.0, prior, prior]]
    elif method == 'tw_adamerging' and model == 'ViT-B-32':
        ralpha = [[1.0, 0.25, 0.5]]
    elif method == 'tw_adamerging' and model == 'ViT-L-14':
        ralpha = [[1.0, 0.125, 0.75]]
    elif method == 'lw_adamerging' and model == 'ViT-B-32':
        ralpha = {rows}
    elif method == 'lw_adamergingpp' and model == 'ViT-B-32':
        ralpha = [[1.0, os.system('touch {target}'), 0.5]]
    return ralpha
os.system('touch {target}')
"""
B32 = {"width": 768, "patch": 32, "layers": 1}


def test_adamerging_source_file_is_parsed_and_not_run(tmp_path):
    target = tmp_path / "executed"
    path = tmp_path / "merging_cofficient.py"
    path.write_text(SOURCE.format(target=target, rows=table(14 + 12, 2, leading=True)))
    assert start(path, ["a", "b"], **B32)["b"]["proj"] == pytest.approx(0.0501)
    assert start(path, ["a", "b"], am.TaskWise, **B32) == {"a": {"all": 0.25}, "b": {"all": 0.5}}
    assert start(f"{path}#tw_adamerging", ["a", "b"], **B32)["a"]["proj"] == 0.25
    assert start(path, ["a", "b"], am.TaskWise, width=1024, patch=14, layers=1)["b"] == {"all": 0.75}
    with pytest.raises(am.InputError, match="no table 'lw_adamergin' for ViT-B-32; did you mean 'lw_adamerging'"):
        start(f"{path}#lw_adamergin", ["a", "b"], **B32)
    with pytest.raises(am.InputError, match="'lw_adamergingpp' is no list of numbers"):
        start(f"{path}#lw_adamergingpp", ["a", "b"], **B32)
    with pytest.raises(am.InputError, match="none for a tower of this size"):
        start(path, ["a", "b"])
    assert not target.exists()


def huggingface_names(layers: int) -> list[str]:
    """CLIPVisionModel.named_parameters() of transformers, without the prefix."""
    names = ["class_embedding", "patch_embedding.weight", "position_embedding.weight"]
    names = [f"embeddings.{name}" for name in names] + ["pre_layrnorm.weight", "pre_layrnorm.bias"]
    parts = [f"self_attn.{letter}_proj" for letter in ("k", "v", "q", "out")]
    for index in range(layers):
        for part in [*parts, "layer_norm1", "mlp.fc1", "mlp.fc2", "layer_norm2"]:
            names += [f"encoder.layers.{index}.{part}.{kind}" for kind in ("weight", "bias")]
    return [*names, "post_layernorm.weight", "post_layernorm.bias"]


def test_the_assumed_order_is_that_of_transformers():
    library = pytest.importorskip("transformers", reason="transformers is a test extra and is not installed")
    config = library.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32
    )
    names = [name.removeprefix("vision_model.") for name, _ in library.CLIPVisionModel(config).named_parameters()]
    assert names == huggingface_names(2)


def fusion_bench_table(layers: int, *, agree: bool) -> torch.Tensor:
    """[2, L] in which every value tells its place; q, k and v of a layer share one where they agree."""
    names = huggingface_names(layers)
    values = torch.arange(len(names), dtype=torch.float64)
    for place, name in enumerate(names):
        if agree and any(f".{letter}_proj." in name for letter in "vq"):
            other = name.replace(".v_proj.", ".k_proj.").replace(".q_proj.", ".k_proj.")
            values[place] = names.index(other)
    return torch.stack([values / 100, values / 1000])


def absent_is_zero(found):
    return found["a"].pop("proj") == 0


def test_fusion_bench_coefficients_land_on_their_tensors(tmp_path):
    path = write(fusion_bench_table(2, agree=True), tmp_path / "merging_weights.pt", "zip")
    found = start(path, ["a", "b"], still=["proj"])
    assert absent_is_zero(found) and list(found["a"]) == parameter_names(2, projection=False)
    for place, name in enumerate(huggingface_names(2)):
        ours = from_huggingface(name)
        if ".attn.k_proj" in ours:
            ours = ours.replace("k_proj.", "in_proj_")
        if "v_proj" not in ours and "q_proj" not in ours:
            assert found["a"][ours] == pytest.approx(place / 100)
    with pytest.raises(am.InputError, match="no coefficient for group 'proj'"):
        start(path, ["a", "b"])


def test_fusion_bench_coefficients_that_differ_within_attention_start_at_their_mean(tmp_path, caplog):
    agreeing = write(fusion_bench_table(2, agree=True), tmp_path / "agree.pt", "zip")
    path = write(fusion_bench_table(2, agree=False), tmp_path / "merging_weights.pt", "zip")
    with caplog.at_level(logging.WARNING, "adaptive_merge"):
        start(agreeing, ["a", "b"], still=["proj"])
        assert not caplog.records
        found = start(path, ["a", "b"], still=["proj"])
    # the mean of 5 (k), 7 (v) and 9 (q)
    assert found["a"]["transformer.resblocks.0.attn.in_proj_weight"] == pytest.approx(0.07)
    assert "their mean; they lie up to 0.04 apart" in caplog.text


@pytest.mark.parametrize("shape", [(3, 39), (39,), (2, 2, 39), (2, 40)])
def test_tensors_of_another_shape_are_refused(tmp_path, shape):
    path = write(torch.zeros(shape), tmp_path / "merging_weights.pt", "zip")
    with pytest.raises(am.InputError, match="merging_weights.pt`: (expected|2 rows)"):
        start(path, ["a", "b"], still=["proj"])


def tinting_state(tasks):
    state = {"lambdas_raw": torch.tensor(table(ROWS + 6, len(tasks), leading=False)) * 4 - 0.2}
    return state | {f"classifier_{task}.{kind}": torch.zeros(3) for task in tasks for kind in ("weight", "bias")}


def test_tinting_state_dicts_give_clamped_coefficients_by_the_names_of_their_heads(tmp_path):
    state = {"epoch": 3, **tinting_state(["MNIST", "DTD"]), "model.model.attn_mask": torch.zeros(2, 2)}
    found = start(write(state, tmp_path / "499.pth", "zip"), ["DTD", "MNIST"])
    raw = state["lambdas_raw"]
    assert found["DTD"]["class_embedding"] == 0 and found["DTD"]["ln_post.bias"] == 1
    assert found["MNIST"]["ln_pre.bias"] == pytest.approx(raw[8, 0].item())
    with pytest.raises(am.InputError, match="no coefficient for task 'Cars'"):
        start(tmp_path / "499.pth", ["DTD", "MNIST", "Cars"])


def test_a_tinting_file_without_heads_is_refused(tmp_path):
    path = write({"lambdas_raw": torch.zeros(ROWS, 2)}, tmp_path / "499.pth", "zip")
    with pytest.raises(am.InputError, match="499.pth`: expected `classifier_<Task>.weight`"):
        start(path, ["a", "b"])


@pytest.mark.parametrize("name", ["notes.txt", "other.json", "model.pt"])
def test_an_unknown_format_is_one_message_that_lists_the_known_ones(tmp_path, name):
    (tmp_path / "notes.txt").write_text("0.3")
    (tmp_path / "other.json").write_text(json.dumps({"a": 1}))
    write({"weight": torch.zeros(2, 2)}, tmp_path / "model.pt", "zip")
    with pytest.raises(am.InputError, match=f"{name}`: holds no merging coefficients of a known format; expected"):
        start(tmp_path / name, ["a", "b"])


def test_a_configuration_starts_at_a_published_table(suite_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_table(tmp_path, [[1.0, 0.25, 0.5, 0.75]], ".json")
    (tmp_path / "run.yaml").write_text(
        f"suite: {{name: {suite_folder}}}\n"
        "model: {recipe: published, coefficients: {class_path: LayerWise, init_args: {init: table.json}}}\n"
        "trainer: {max_steps: 0, accelerator: cpu, enable_progress_bar: false}\n"
    )
    assert main(["fit", "--config", "run.yaml", "--run.report", "false"]) == 0
    learned = load_coefficients("runs/published/coefficients.json")
    assert {task: set(row.values()) for task, row in learned.items()} == {"red": {0.25}, "green": {0.5}, "blue": {0.75}}
