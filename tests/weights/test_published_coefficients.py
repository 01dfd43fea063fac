"""Coefficients by name: ours keep every bit and notice every change, published tables land on the right tensors."""

from __future__ import annotations

import json
import random

import pytest
import torch

from adaptive_merge.coefficients.files import load_coefficients, save_coefficients
from adaptive_merge.coefficients.published import from_table, read_adamerging, read_fusion_bench, read_tinting
from adaptive_merge.errors import InputError, MissingFileError
from adaptive_merge.weights.huggingface import from_huggingface
from adaptive_merge.weights.open_clip_names import parameter_names
from weights.checkpoint_helpers import write

TASKS = ["SUN397", "Cars", "../../x", "ünï", "__metadata__"]
SUFFIXES = [".safetensors", ".json"]


@pytest.fixture
def coefficients():
    generator = random.Random(0)
    return {task: {name: generator.gauss(0.3, 0.2) for name in parameter_names(2)} for task in TASKS}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_saved_is_loaded_bit_for_bit_and_in_order(tmp_path, coefficients, suffix):
    path = tmp_path / f"deep/coefficients{suffix}"
    save_coefficients(path, coefficients, notes={"recipe": "adamerging"})
    found = load_coefficients(path)
    assert found == coefficients
    assert [list(row) for row in (found, found["Cars"])] == [TASKS, parameter_names(2)]
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_thousand_mutations_are_all_noticed(tmp_path, coefficients, suffix):
    path, generator = tmp_path / f"coefficients{suffix}", random.Random(1)
    save_coefficients(path, coefficients)
    content = path.read_bytes()
    for _ in range(1000):
        damaged = bytearray(content)
        place = generator.randrange(len(content))
        match generator.randrange(4):
            case 0:
                damaged[place] ^= 1 << generator.randrange(8)
            case 1:
                del damaged[place:]
            case 2:
                damaged[place:place] = bytes([generator.randrange(256)])
            case 3:
                damaged[:200] = damaged[:200].replace(b"0", b"1", 1)
        path.write_bytes(damaged)
        if damaged != content:
            with pytest.raises(InputError, match="coefficients"):
                load_coefficients(path)


def test_an_edit_by_hand_is_noticed_and_said(tmp_path):
    save_coefficients(tmp_path / "c.json", {"MNIST": {"proj": 0.25}})
    (tmp_path / "c.json").write_text((tmp_path / "c.json").read_text().replace("0.25", "0.35"))
    with pytest.raises(InputError, match="c.json`: its digest does not fit its content"):
        load_coefficients(tmp_path / "c.json")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({}, "at least one task"),
        ({"a": {}}, "at least one task"),
        ({"a": {"x": 1.0}, "b": {"y": 1.0}}, "task 'b' has other parameter names"),
        ({"a": {"x": float("nan")}}, "task 'a', parameter `x`: expected a number, found nan"),
    ],
)
def test_coefficients_that_make_no_sense_are_not_saved(tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        save_coefficients(tmp_path / "c.json", rows)
    assert not (tmp_path / "c.json").exists()


def test_files_that_are_not_ours_are_refused(tmp_path):
    with pytest.raises(MissingFileError):
        load_coefficients(tmp_path / "none.json")
    (tmp_path / "other.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(InputError, match="other.json`: it has no digest"):
        load_coefficients(tmp_path / "other.json")
    with pytest.raises(InputError, match="ends in .safetensors or .json, found '.yaml'"):
        save_coefficients(tmp_path / "c.yaml", {"a": {"x": 1.0}})


def table(rows: int, tasks: int, *, leading: bool) -> list[list[float]]:
    return [[1.0] * leading + [row + column / 10 for column in range(tasks)] for row in range(rows)]


@pytest.mark.parametrize("leading", [True, False])
@pytest.mark.parametrize(("rows", "layers", "first"), [(158, 12, 3), (302, 24, 3), (152, 12, 0), (296, 24, 0)])
def test_rows_land_on_their_tensors_and_text_rows_are_dropped(rows, layers, first, leading):
    found = from_table(table(rows, 3, leading=leading), ["a", "b", "c"])
    names = parameter_names(layers)
    assert list(found["b"]) == names
    assert [found["b"][name] for name in names] == pytest.approx([first + i + 0.1 for i in range(len(names))])


def test_the_rows_of_the_published_layout_one_by_one():
    found = from_table(table(158, 1, leading=True), ["a"])["a"]
    expected = {
        "class_embedding": 3,
        "positional_embedding": 4,
        "proj": 5,
        "conv1.weight": 6,
        "ln_pre.weight": 7,
        "transformer.resblocks.0.ln_1.weight": 9,
        "transformer.resblocks.11.mlp.c_proj.bias": 9 + 12 * 12 - 1,
        "ln_post.weight": 153,
        "ln_post.bias": 154,
    }
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (158, 7, "expected 8 columns"),
        (199, 8, "Hugging Face's order"),
        (150, 8, "150 rows, expected"),
        (1, 8, "`layers`"),
    ],
)
def test_tables_of_another_shape_are_refused(rows, columns, message):
    with pytest.raises(InputError, match=message):
        from_table(table(rows, columns, leading=False), list("abcdefgh"))


def test_a_first_column_that_is_not_one_is_not_taken_for_the_pretrained_one():
    with pytest.raises(InputError, match="the first all 1"):
        from_table(table(158, 9, leading=False), list("abcdefgh"))


SOURCE = """
import os
def get_merging_cofficients(method, model):
    os.system('touch {target}')
    if method == 'tw' and model == 'ViT-B-32':
        ralpha = [[1.0, 0.25, 0.5]]
    elif method == 'lw' and model == 'ViT-L-14':
        ralpha = {rows}
    return ralpha
os.system('touch {target}')
"""


def test_adamerging_source_file_is_parsed_and_not_run(tmp_path):
    target = tmp_path / "executed"
    path = tmp_path / "merging_cofficient.py"
    path.write_text(SOURCE.format(target=target, rows=table(302, 2, leading=True)))
    layer_wise = read_adamerging(path, ["a", "b"], method="lw", model="ViT-L-14")
    assert layer_wise["b"]["proj"] == 5.1
    task_wise = read_adamerging(path, ["a", "b"], method="tw", model="ViT-B-32")
    assert task_wise == {"a": dict.fromkeys(parameter_names(12), 0.25), "b": dict.fromkeys(parameter_names(12), 0.5)}
    with pytest.raises(InputError, match="no table for method 'lw' and model 'ViT-B-32'"):
        read_adamerging(path, ["a", "b"], method="lw")
    assert not target.exists()


def test_adamerging_tables_as_json_and_as_tensor(tmp_path):
    rows = table(158, 2, leading=True)
    (tmp_path / "t.json").write_text(json.dumps(rows))
    write(torch.tensor(rows, dtype=torch.float64), tmp_path / "t.pt", "zip")
    assert read_adamerging(tmp_path / "t.json", ["a", "b"]) == from_table(rows, ["a", "b"])
    assert read_adamerging(tmp_path / "t.pt", ["a", "b"]) == from_table(rows, ["a", "b"])


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
    return torch.stack([values, values / 1000])


def test_fusion_bench_coefficients_land_on_their_tensors(tmp_path):
    path = write(fusion_bench_table(12, agree=True), tmp_path / "merging_weights.pt", "zip")
    found = read_fusion_bench(path, ["a", "b"])
    names = huggingface_names(12)
    assert list(found["a"]) == parameter_names(12, projection=False)
    for place, name in enumerate(names):
        ours = from_huggingface(name)
        if ".attn.k_proj" in ours:
            ours = ours.replace("k_proj.", "in_proj_")
        if "v_proj" not in ours and "q_proj" not in ours:
            assert found["a"][ours] == place


def test_fusion_bench_coefficients_that_differ_within_attention_are_refused_or_averaged(tmp_path):
    path = write(fusion_bench_table(12, agree=False), tmp_path / "merging_weights.pt", "zip")
    with pytest.raises(InputError, match='q, k, v weight have coefficients \\[9.0, 5.0, 7.0\\].*attention="mean"'):
        read_fusion_bench(path, ["a", "b"])
    found = read_fusion_bench(path, ["a", "b"], attention="mean")
    assert found["a"]["transformer.resblocks.0.attn.in_proj_weight"] == 7.0  # the mean of 5 (k), 7 (v) and 9 (q)


@pytest.mark.parametrize("shape", [(2, 158), (3, 199), (199,)])
def test_fusion_bench_tables_of_another_shape_are_refused(tmp_path, shape):
    path = write(torch.zeros(shape), tmp_path / "merging_weights.pt", "zip")
    with pytest.raises(InputError, match="in the order in which the models were merged"):
        read_fusion_bench(path, ["a", "b"])


def tinting_state(tasks):
    state = {"lambdas_raw": torch.tensor(table(158, len(tasks), leading=False)) / 100 - 0.05}
    for seed, task in enumerate(tasks):
        generator = torch.Generator().manual_seed(seed)
        state[f"classifier_{task}.weight"] = torch.randn(3 + seed, 8, generator=generator)
        state[f"classifier_{task}.bias"] = torch.randn(3 + seed, generator=generator)
    return state


def test_tinting_state_dicts_give_clamped_coefficients_and_heads(tmp_path):
    state = {**tinting_state(["MNIST", "DTD"]), "model.model.attn_mask": torch.zeros(2, 2)}
    path = write(state, tmp_path / "499.pth", "zip")
    found = read_tinting(path)
    raw = state["lambdas_raw"]
    assert list(found.coefficients) == list(found.heads) == ["MNIST", "DTD"]
    assert found.coefficients["DTD"]["class_embedding"] == raw[3, 1].clamp(0, 1).item() == 0
    assert found.coefficients["DTD"]["ln_post.bias"] == 1.0
    assert read_tinting(path, clamp=False).coefficients["DTD"]["ln_post.bias"] == pytest.approx(raw[154, 1].item())
    assert torch.equal(found.heads["DTD"][0], state["classifier_DTD.weight"])
    assert torch.equal(found.heads["DTD"][1], state["classifier_DTD.bias"])
    assert found.ignored == ("model.model.attn_mask",)


def test_tinting_columns_in_another_order_are_refused(tmp_path):
    path = write(tinting_state(["MNIST", "DTD"]), tmp_path / "499.pth", "zip")
    with pytest.raises(InputError, match=r"belong to \['MNIST', 'DTD'\], in this order"):
        read_tinting(path, ["DTD", "MNIST"])


@pytest.mark.parametrize("lost", ["lambdas_raw", "classifier_DTD.bias"])
def test_incomplete_tinting_files_are_refused(tmp_path, lost):
    state = tinting_state(["MNIST", "DTD"])
    del state[lost]
    with pytest.raises(InputError, match="499.pth"):
        read_tinting(write(state, tmp_path / "499.pth", "zip"))
