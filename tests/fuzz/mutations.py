"""Changed copies of files, from a seed: bytes, and the values that JSON, YAML, tensors and arrays hold."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file

# What stands where something else is expected.
STRANGE = (
    *(None, True, -1, 0, 1.5, 10**30, float("nan"), float("inf"), "", "x", "nan", "[/red]", "\x1b[31m"),
    *("../../x", "a" * 5000, "${HOME}", "hf-hub:a/b", "http://127.0.0.1:9/x", "os.system"),
    *([], {}, [1, "a"], {"class_path": "os.system"}, [[[[]]]]),
)


def damage(content: bytes, draw: random.Random) -> bytes:
    """Bits flipped, pieces cut, swapped, doubled, inserted, or all replaced."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        place = min(int(len(data) * draw.random() ** draw.choice((1, 3))), max(len(data) - 1, 0))
        kind = draw.randrange(7)
        if kind == 0 and data:
            data[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[place:]
        elif kind == 2:
            data[place : place + draw.randrange(1, 9)] = draw.randbytes(draw.randrange(1, 9))
        elif kind == 3:
            data[place:place] = data[: draw.randrange(1, 200)]
        elif kind == 4:
            del data[place : place + draw.randrange(1, 100)]
        elif kind == 5 and data:
            data[-1 - draw.randrange(min(len(data), 200))] = draw.randrange(256)
        else:
            data[place : place + 8] = draw.choice((bytes(8), b"\xff" * 8, (1 << 60).to_bytes(8, "little")))
    return bytes(data)


def strange(content, draw: random.Random):
    """A copy of nested settings in which one key or value is something else, gone, or twice there."""
    content = copy.deepcopy(content)
    place, parents = content, []
    while isinstance(place, (dict, list)) and place and (not parents or draw.random() < 0.75):
        key = draw.choice(list(place)) if isinstance(place, dict) else draw.randrange(len(place))
        parents.append((place, key))
        place = place[key]
    if not parents:
        return draw.choice(STRANGE)
    holder, key = parents[-1]
    kind = draw.randrange(5)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[draw.choice(("x", "class_path", str(key)[:-1] + "x", "[/b]"))] = holder.pop(key)
    elif kind == 2 and isinstance(holder, list):
        holder.append(holder[key])
    else:
        holder[key] = copy.deepcopy(draw.choice(STRANGE))
    return content


def change_json(path: Path, draw: random.Random) -> None:
    path.write_text(json.dumps(strange(json.loads(path.read_text()), draw)))


def change_yaml(path: Path, draw: random.Random) -> None:
    path.write_text(yaml.safe_dump(strange(yaml.safe_load(path.read_text()), draw), allow_unicode=True))


def strange_tensor(tensor: torch.Tensor, draw: random.Random) -> torch.Tensor:
    """Another type, shape or number; never the same values in disguise."""
    kind = draw.randrange(6)
    if kind == 0:
        return tensor.to(draw.choice((torch.int64, torch.bool, torch.complex64, torch.uint8)))
    if kind == 1:
        return tensor.flatten()[: max(tensor.numel() - 1, 0)]
    if kind == 2:
        return tensor.unsqueeze(draw.randrange(tensor.dim() + 1))
    if kind == 3:
        return torch.zeros([0] * tensor.dim())
    if kind == 4:
        return torch.zeros(())
    return torch.full(tensor.shape, draw.choice((float("nan"), float("inf"))))  # of integers too


def change_state(state: dict[str, torch.Tensor], draw: random.Random) -> dict[str, torch.Tensor]:
    """A copy of named tensors of which one is changed, gone, renamed, or beside a stranger."""
    state = {name: value.clone() for name, value in state.items()}
    name = draw.choice(list(state))
    kind = draw.randrange(5)
    if kind == 0:
        state.pop(name)
    elif kind == 1:
        state[draw.choice(("x", f"{name}x", "visual." + name, name.replace("0", "999999999")))] = state.pop(name)
    elif kind == 2:
        state[draw.choice(("stranger", f"module.{name}", "transformer.resblocks.7.ln_1.bias"))] = torch.zeros(3)
    else:
        state[name] = strange_tensor(state[name], draw).contiguous()
    return state


def change_safetensors(path: Path, draw: random.Random) -> None:
    save_file(change_state(load_file(path), draw), path)


def change_npz(path: Path, draw: random.Random) -> None:
    with np.load(path) as file:
        arrays = dict(file)
    name = draw.choice(list(arrays))
    array, kind = arrays[name], draw.randrange(7)
    if kind == 0:
        del arrays[name]
    elif kind == 1:
        arrays[name] = (
            array.astype(draw.choice(("U4", "S3", "complex64", "float16", "bool", "M8[s]")))
            if array.ndim == 1
            else array[..., None]
        )
    elif kind == 2:
        arrays[name] = array[:-1]
    elif kind == 3:
        arrays[name] = array[:0]
    elif kind == 4:
        arrays[name] = np.array([object()] * len(array))
    elif kind == 5:
        arrays[name] = array.reshape(1, *array.shape)
    else:
        arrays[name] = array.astype(np.int64) + draw.choice((-1000, 1000))
    np.savez(path, **arrays)  # fmt: skip
