"""Coefficients to start from: what a run wrote, and three published kinds, read row by row into names.

A published table has one row or column per tensor in the order of somebody's state dict, and its columns name no task.
"""

from __future__ import annotations

import ast
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from adaptive_merge.coefficients.files import FORMAT, Coefficients, load_coefficients
from adaptive_merge.errors import InputError, did_you_mean
from adaptive_merge.merge.layout import Layout
from adaptive_merge.weights.open_clip_names import parameter_names
from adaptive_merge.weights.pickles import TensorRecord
from adaptive_merge.weights.torch_files import TorchFile, open_torch_file

__all__ = ["ALL", "read_coefficients"]

ALL: Final = "all"  # the one group of task-wise coefficients
_EIGHT: Final = ("SUN397", "Cars", "RESISC45", "EuroSAT", "SVHN", "GTSRB", "MNIST", "DTD")
_TEXT_BEFORE: Final = 3  # positional_embedding, text_projection, logit_scale
_TEXT_AFTER: Final = 3  # token_embedding.weight, ln_final.weight, ln_final.bias
_BLOCK_ROWS: Final = 12
_FIXED_ROWS: Final = 8  # the tower's rows outside the blocks
_HF_FIXED: Final = 7
_HF_BLOCK: Final = 16
_KINDS: Final = ("weight", "bias")
_HEAD: Final = "classifier_"
_LAMBDAS: Final = "lambdas_raw"
_TORCH_FILES: Final = (".pt", ".pth", ".bin", ".pkl", ".ckpt")
# (width, patch) of the towers in AdaMerging's source file, and its names for them.
_MODELS: Final = {(768, 32): "ViT-B-32", (768, 16): "ViT-B-16", (1024, 14): "ViT-L-14"}
_log = logging.getLogger(__name__)


def read_coefficients(path: Path, tasks: Sequence[str], layout: Layout, table: str) -> Coefficients:
    """{task: {group: λ}} of a run folder or a file; task-wise coefficients have the one group `"all"`.

    Known are a run's `coefficients.json` (or `.safetensors`), AdaMerging's `merging_cofficient.py` (parsed, never
    run) or its table as `.json` or tensor, fusion_bench's `merging_weights.pt`, and a state dict of Model Tinting.
    Columns that name no task are the eight published tasks in their order where the merge is of these, else the
    merge's own tasks.

    Args:
        tasks: of the merge, in its order.
        layout: of the merge; its sizes choose the tower in AdaMerging's file.
        table: which one of AdaMerging's file, such as `"lw_adamergingpp"`.

    Raises:
        MissingFileError, InputError: not there, of an unknown format, damaged, or of another size.
    """
    if path.is_dir():
        return load_coefficients(path / "coefficients.json")
    if path.suffix == ".safetensors":
        return load_coefficients(path)
    if path.suffix == ".py":
        return _from_table(_table_in_source(path, layout, table), tasks, path)
    if path.suffix == ".json":
        return _from_json(path, tasks)
    if path.suffix in _TORCH_FILES:
        file = open_torch_file(path)
        if isinstance(file.root, TensorRecord):
            return _from_tensor(file.tensor(file.root, path.name), tasks, path)
        if isinstance(file.root, dict) and isinstance(file.root.get(_LAMBDAS), TensorRecord):
            return _from_tinting(file)
    raise _unknown(path)


def _unknown(path: Path) -> InputError:
    return InputError(
        f"`{path}`: holds no merging coefficients of a known format; expected a run folder or its coefficients.json, "
        "AdaMerging's merging_cofficient.py or a table of its rows (.json, .pt), fusion_bench's merging_weights.pt, or "
        f"a checkpoint of Model Tinting with `{_LAMBDAS}`"
    )


def _from_json(path: Path, tasks: Sequence[str]) -> Coefficients:
    """Ours, or a list of rows."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return load_coefficients(path)  # which says what is wrong with it
    if isinstance(content, list):
        return _from_table(content, tasks, path)
    if isinstance(content, dict) and content.get("format") == FORMAT:
        return load_coefficients(path)
    raise _unknown(path)


def _from_table(table: Any, tasks: Sequence[str], path: Path) -> Coefficients:
    """A table [rows, tasks] or [rows, 1 + tasks] in the order of `ImageEncoder.state_dict()`, by name.

    Rows are 14 + 12 · layers (158 for B, 302 for L models; the six text rows are dead and dropped), or
    8 + 12 · layers for the image tower alone, or one row for task-wise coefficients. A leading column belongs to θ₀
    and must be 1.
    """
    try:
        rows = torch.as_tensor(table, dtype=torch.float64)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"`{path}`: expected rows of numbers, all of one length ({error})") from error
    rows = rows[None] if rows.dim() == 1 else rows
    if rows.dim() != 2 or not rows.numel():
        raise InputError(f"`{path}`: expected a table [rows, tasks], found {tuple(rows.shape)}")
    if rows.shape[1] in (len(tasks) + 1, len(_EIGHT) + 1) and bool((rows[:, 0] == 1).all()):
        rows = rows[:, 1:]
    names = _row_names(rows.shape[0], path)
    return {
        task: {name: value for name, value in zip(names, column.tolist()) if name is not None}
        for task, column in zip(_owners(rows.shape[1], tasks, path), rows.t())
    }


def _owners(columns: int, tasks: Sequence[str], path: Path) -> Sequence[str]:
    """The task of each column of a table that does not name them."""
    if columns == len(_EIGHT) and set(tasks) <= set(_EIGHT):
        return _EIGHT
    if columns != len(tasks):
        raise InputError(
            f"`{path}`: expected {len(tasks)} columns, one per task ({', '.join(tasks)}), or one more, all 1, for the "
            f"pre-trained weights; found {columns}"
        )
    return tasks


def _row_names(rows: int, path: Path) -> list[str | None]:
    if rows == 1:
        return [ALL]
    text = _TEXT_BEFORE + _TEXT_AFTER
    whole, rest = divmod(rows - _FIXED_ROWS - text, _BLOCK_ROWS)
    if rest == 0 and whole > 0:
        return [None] * _TEXT_BEFORE + list(parameter_names(whole)) + [None] * _TEXT_AFTER
    alone, rest = divmod(rows - _FIXED_ROWS, _BLOCK_ROWS)
    if rest or alone < 1:
        raise InputError(
            f"`{path}`: {rows} rows, expected 14 + 12 · layers (158, 302), 8 + 12 · layers (152, 296) or 1; "
            f"fusion_bench's tables have {_HF_FIXED} + {_HF_BLOCK} · layers (199, 391) columns and a row per task"
        )
    return list(parameter_names(alone))


def _from_tensor(table: Tensor, tasks: Sequence[str], path: Path) -> Coefficients:
    """AdaMerging's table [rows, tasks], or fusion_bench's [tasks, 7 + 16 · layers] in Hugging Face's order."""
    layers, rest = divmod(table.shape[-1] - _HF_FIXED, _HF_BLOCK) if table.dim() else (0, 0)
    if table.dim() != 2 or rest or layers < 1:
        return _from_table(table, tasks, path)
    rows = table.double()
    owners = _owners(len(rows), tasks, path)
    # Hugging Face has q, k, v apart and three coefficients where open_clip has one.
    attention = rows[:, 5:-2].view(len(rows), layers, _HF_BLOCK // 2, 2)[:, :, :3]
    spread = float((attention.amax(2) - attention.amin(2)).max())
    if spread:
        _log.warning(
            "%s: q, k, v of a layer have a coefficient each there and one in common here: it starts at their mean; "
            "they lie up to %.3g apart",
            *(path, spread),
        )
    return {task: _from_huggingface_row(row.tolist(), layers) for task, row in zip(owners, rows)}


def _from_huggingface_row(row: list[float], layers: int) -> dict[str, float]:
    """By open_clip's names. `proj` has no coefficient, because those experts never trained it."""
    values = iter(row)
    named = {name: next(values) for name in ("class_embedding", "conv1.weight", "positional_embedding")}
    named |= {f"ln_pre.{kind}": next(values) for kind in _KINDS}
    for index in range(layers):
        block = f"transformer.resblocks.{index}."
        attention = [next(values) for _ in range(6)]  # weight and bias of each of k, v, q
        for kind, three in zip(_KINDS, (attention[::2], attention[1::2])):
            named[f"{block}attn.in_proj_{kind}"] = three[0] if len(set(three)) == 1 else sum(three) / 3
        for part in ("attn.out_proj", "ln_1", "mlp.c_fc", "mlp.c_proj", "ln_2"):
            named |= {f"{block}{part}.{kind}": next(values) for kind in _KINDS}
    named |= {f"ln_post.{kind}": next(values) for kind in _KINDS}
    return {name: named[name] for name in parameter_names(layers, projection=False)}


def _from_tinting(file: TorchFile) -> Coefficients:
    """`lambdas_raw` [rows, tasks] of a state dict, used there as clamp(raw, 0, 1); its heads name the columns."""
    names = (name for name in file.root if isinstance(name, str) and name.startswith(_HEAD))
    heads = list(dict.fromkeys(name[len(_HEAD) :].rpartition(".")[0] for name in names))
    if not heads:
        raise InputError(f"`{file.path}`: expected `{_HEAD}<Task>.weight` beside `{_LAMBDAS}`, to name its columns")
    return _from_table(file.tensor(file.root[_LAMBDAS], _LAMBDAS).clamp(0, 1), heads, file.path)


def _table_in_source(path: Path, layout: Layout, method: str) -> list[list[float]]:
    """The literal assigned under `if method == … and model == …` in AdaMerging's source file."""
    shapes = dict(zip(layout.names, layout.shapes))
    sizes = (shapes.get("class_embedding", (0,))[0], shapes.get("conv1.weight", (0,))[-1])
    tables: dict[str, ast.expr] = {}
    try:
        tree = ast.parse(path.read_text())
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"`{path}`: not readable as Python source ({error})") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.If):
            constants = [item.value for item in ast.walk(node.test) if isinstance(item, ast.Constant)]
            values = [item.value for item in node.body if isinstance(item, ast.Assign)]
            if len(constants) == 2 and constants[1] == _MODELS.get(sizes) and len(values) == 1:
                tables[str(constants[0])] = values[0]
    if method not in tables:
        near = did_you_mean(method, tables) if tables else "; it has none for a tower of this size"
        raise InputError(f"`{path}`: no table {method!r} for {_MODELS.get(sizes, 'this tower')}{near}")
    try:
        return ast.literal_eval(tables[method])
    except (ValueError, TypeError, RecursionError, MemoryError) as error:
        raise InputError(f"`{path}`: table {method!r} is no list of numbers ({error})") from error
