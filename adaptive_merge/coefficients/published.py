"""Published coefficients, read row by row into names: AdaMerging, fusion_bench, Model Tinting."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

from adaptive_merge.coefficients.files import Coefficients
from adaptive_merge.errors import InputError, MissingFileError
from adaptive_merge.weights.open_clip_names import parameter_names
from adaptive_merge.weights.pickles import TensorRecord
from adaptive_merge.weights.reader import open_entries
from adaptive_merge.weights.torch_files import open_torch_file

__all__ = ["TintingState", "from_table", "read_adamerging", "read_fusion_bench", "read_tinting"]

_TEXT_BEFORE: Final = 3  # positional_embedding, text_projection, logit_scale
_TEXT_AFTER: Final = 3  # token_embedding.weight, ln_final.weight, ln_final.bias
_BLOCK_ROWS: Final = 12
_FIXED_ROWS: Final = 8  # the tower's rows outside the blocks
_HF_FIXED: Final = 7
_HF_BLOCK: Final = 16
_HF_ATTENTION: Final = ("k", "v", "q")  # the order in which CLIPAttention declares them
_HEAD: Final = "classifier_"


@dataclass(frozen=True)
class TintingState:
    """λ by name, tinted heads {task: (weight [C, d], bias [C])}, and the entries that were not read."""

    coefficients: Coefficients
    heads: dict[str, tuple[Tensor, Tensor]] = field(repr=False)
    ignored: tuple[str, ...] = ()


def from_table(
    table: Sequence[Sequence[float]] | Tensor,
    tasks: Sequence[str],
    *,
    layers: int | None = None,
    source: str = "table",
) -> Coefficients:
    """A table [rows, tasks] or [rows, 1 + tasks] in the order of `ImageEncoder.state_dict()`, by name.

    Rows are 14 + 12 · layers (158 for B, 302 for L models; the six text rows are dead and dropped), or
    8 + 12 · layers for the image tower alone, or one row for task-wise coefficients, which `layers` then spreads.
    A leading column belongs to θ₀ and must be 1.
    """
    rows = torch.as_tensor(table, dtype=torch.float64)
    if rows.dim() != 2:
        raise InputError(f"`{source}`: expected a table [rows, tasks], found {rows.dim()} dimensions")
    columns = rows.shape[1]
    if columns == len(tasks) + 1 and bool((rows[:, 0] == 1).all()):
        rows = rows[:, 1:]
    elif columns != len(tasks):
        raise InputError(
            f"`{source}`: expected {len(tasks)} columns (one per task) or {len(tasks) + 1} (the first all 1, for the "
            f"pre-trained weights), found {columns}; give `tasks` in the order of the columns"
        )
    names = _row_names(rows.shape[0], layers, source)
    if rows.shape[0] == 1:
        rows = rows.expand(len(names), -1)
    return {
        task: {name: value for name, value in zip(names, rows[:, column].tolist()) if name is not None}
        for column, task in enumerate(tasks)
    }


def read_adamerging(
    path: str | Path, tasks: Sequence[str], *, method: str = "lw_adamerging", model: str = "ViT-B-32"
) -> Coefficients:
    """AdaMerging's table from its own `merging_cofficient.py` (parsed, never run), a JSON file or a saved tensor.

    Args:
        tasks: in the order of the columns; the published files have SUN397, Cars, RESISC45, EuroSAT, SVHN, GTSRB,
            MNIST, DTD.
        method, model: which table of the Python file (`tw_adamerging`, `lw_adamergingpp` …; `ViT-L-14` …).
    """
    path = _existing(path)
    if path.suffix == ".py":
        return from_table(_table_in_source(path, method, model), tasks, layers=_layers_of(model), source=str(path))
    if path.suffix == ".json":
        try:
            return from_table(json.loads(path.read_text()), tasks, layers=_layers_of(model), source=str(path))
        except (ValueError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"`{path}`: expected a list of rows of numbers ({error})") from error
    return from_table(_bare_tensor(path), tasks, layers=_layers_of(model), source=str(path))


def read_fusion_bench(
    path: str | Path, tasks: Sequence[str], *, attention: Literal["exact", "mean"] = "exact"
) -> Coefficients:
    """fusion_bench's `merging_weights.pt` [tasks, 7 + 16 · layers], in Hugging Face's order, by open_clip's names.

    Hugging Face has q, k, v apart and three coefficients where open_clip has one: an exact transfer needs the three
    to agree. `proj` has no coefficient, because those experts never trained it.

    Args:
        attention: `"mean"` takes the mean of the three instead of refusing.
    """
    path = _existing(path)
    table = _bare_tensor(path).to(torch.float64)
    layers, rest = divmod(table.shape[-1] - _HF_FIXED, _HF_BLOCK)
    if table.dim() != 2 or table.shape[0] != len(tasks) or rest or layers < 1:
        raise InputError(
            f"`{path}`: expected [{len(tasks)} tasks, {_HF_FIXED} + {_HF_BLOCK} · layers] (199 for B models), found "
            f"{tuple(table.shape)}; give `tasks` in the order in which the models were merged"
        )
    return {
        task: _from_huggingface_row(row.tolist(), layers, attention, f"`{path}`: task {task!r}")
        for task, row in zip(tasks, table)
    }


def read_tinting(path: str | Path, tasks: Sequence[str] | None = None, *, clamp: bool = True) -> TintingState:
    """A state dict of Model Tinting (`{epoch}.pth`): `lambdas_raw` [rows, tasks] and `classifier_<Task>.*`.

    Args:
        tasks: must be the heads' order in the file, which is the order of the columns; None takes it from there.
        clamp: λ is used as clamp(raw, 0, 1) there, unless the run was made with `--noclamp`.
    """
    path = _existing(path)
    loaders, _, _ = open_entries(path)
    heads = list(dict.fromkeys(name[len(_HEAD) :].rpartition(".")[0] for name in loaders if name.startswith(_HEAD)))
    if "lambdas_raw" not in loaders or not heads:
        raise InputError(f"`{path}`: expected `lambdas_raw` and `{_HEAD}<Task>.weight`, found {list(loaders)[:4]}")
    if tasks is not None and list(tasks) != heads:
        raise InputError(f"`{path}`: its columns belong to {heads}, in this order; `tasks` is {list(tasks)}")
    raw = loaders["lambdas_raw"]()
    coefficients = from_table(raw.clamp(0, 1) if clamp else raw, heads, source=str(path))
    read = {
        task: tuple(loaders[f"{_HEAD}{task}.{kind}"]().float().clone() for kind in ("weight", "bias"))
        for task in heads
        if f"{_HEAD}{task}.bias" in loaders
    }
    if len(read) != len(heads):
        raise InputError(f"`{path}`: expected `{_HEAD}<Task>.weight` and `.bias` for each of {heads}")
    ignored = tuple(name for name in loaders if name != "lambdas_raw" and not name.startswith(_HEAD))
    return TintingState(coefficients, read, ignored)  # type: ignore[arg-type]


def _row_names(rows: int, layers: int | None, source: str) -> list[str | None]:
    if rows == 1:
        if layers is None:
            raise InputError(f"`{source}`: one row is task-wise; give `layers` (12 for B, 24 for L) to spread it")
        return list(parameter_names(layers))
    text = _TEXT_BEFORE + _TEXT_AFTER
    whole, rest = divmod(rows - _FIXED_ROWS - text, _BLOCK_ROWS)
    if rest == 0 and whole > 0:
        return [None] * _TEXT_BEFORE + list(parameter_names(whole)) + [None] * _TEXT_AFTER
    alone, rest = divmod(rows - _FIXED_ROWS, _BLOCK_ROWS)
    if rest or alone < 1:
        raise InputError(
            f"`{source}`: {rows} rows, expected 14 + 12 · layers (158, 302), 8 + 12 · layers (152, 296) or 1; 199 or "
            "391 rows are Hugging Face's order, for `read_fusion_bench`"
        )
    return list(parameter_names(alone))


def _from_huggingface_row(row: list[float], layers: int, attention: str, where: str) -> dict[str, float]:
    values = iter(row)
    found = {name: next(values) for name in ("class_embedding", "conv1.weight", "positional_embedding")}
    found |= {f"ln_pre.{kind}": next(values) for kind in ("weight", "bias")}
    for index in range(layers):
        block = f"transformer.resblocks.{index}."
        split = {(part, kind): next(values) for part in _HF_ATTENTION for kind in ("weight", "bias")}
        for kind in ("weight", "bias"):
            three = [split[part, kind] for part in "qkv"]
            if attention == "exact" and len(set(three)) > 1:
                raise InputError(
                    f"{where}: layer {index}, q, k, v {kind} have coefficients {three}, expected equal ones: open_clip "
                    'holds the three in one tensor with one coefficient. Pass `attention="mean"` for their mean'
                )
            found[f"{block}attn.in_proj_{kind}"] = three[0] if len(set(three)) == 1 else sum(three) / 3
        for part in ("attn.out_proj", "ln_1", "mlp.c_fc", "mlp.c_proj", "ln_2"):
            found |= {f"{block}{part}.{kind}": next(values) for kind in ("weight", "bias")}
    found |= {f"ln_post.{kind}": next(values) for kind in ("weight", "bias")}
    return {name: found[name] for name in parameter_names(layers, projection=False)}


def _table_in_source(path: Path, method: str, model: str) -> list[list[float]]:
    """The literal assigned under `if method == … and model == …` in AdaMerging's source file."""
    try:
        tree = ast.parse(path.read_text())
    except (SyntaxError, ValueError) as error:
        raise InputError(f"`{path}`: not readable as Python source ({error})") from error
    for node in ast.walk(tree):
        if not isinstance(node, ast.If):
            continue
        constants = {item.value for item in ast.walk(node.test) if isinstance(item, ast.Constant)}
        values: list[Any] = [item.value for item in node.body if isinstance(item, ast.Assign)]
        if {method, model} <= constants and len(values) == 1:
            return ast.literal_eval(values[0])
    raise InputError(f"`{path}`: no table for method {method!r} and model {model!r}; look into the file for its names")


def _bare_tensor(path: Path) -> Tensor:
    file = open_torch_file(path)
    if not isinstance(file.root, TensorRecord):
        raise InputError(f"`{path}`: expected one saved tensor, found {type(file.root).__name__}")
    return file.tensor(file.root, path.name)


def _layers_of(model: str) -> int | None:
    return {"ViT-B-32": 12, "ViT-B-16": 12, "ViT-L-14": 24}.get(model)


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"`{path}`: no such file; expected published merging coefficients")
    return path
