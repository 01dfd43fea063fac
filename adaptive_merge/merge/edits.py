"""Functions at a tower's submodules: they replace an output, or stand for the submodule itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from adaptive_merge.errors import InputError, did_you_mean

__all__ = ["Edit", "Instead", "edited"]

Edit = Callable[[Any, Any], Any]
"""(first positional input, output) of a submodule → what replaces the output."""


class Instead:
    """An edit that runs in place of its submodule, before the others there; it is given None for the output.

    Args:
        edit: what runs.
    """

    def __init__(self, edit: Edit) -> None:
        self.edit = edit

    def __call__(self, tokens: Any, output: Any) -> Any:
        return self.edit(tokens, output)


@contextmanager
def edited(module: nn.Module, edits: Sequence[tuple[str, Edit]]) -> Iterator[None]:
    """Let the edits run at the named submodules, in this order, while the context lasts.

    Raises:
        InputError: there is no such submodule; two edits run in place of one.
    """
    with ExitStack() as stack:
        for name, edit in edits:
            part = _submodule(module, name)
            if isinstance(edit, Instead):
                _stand_in(stack, name, part, edit)
            else:
                stack.enter_context(part.register_forward_hook(partial(_run_edit, edit)))
        yield


def _stand_in(stack: ExitStack, name: str, part: nn.Module, edit: Instead) -> None:
    own = part.__dict__.get("forward")
    if isinstance(getattr(own, "func", None), Instead):
        raise InputError(f"two adapters run in place of the submodule {name!r}; leave one of them out")
    part.__dict__["forward"] = partial(edit, output=None)
    restore = part.__dict__.pop if own is None else part.__dict__.__setitem__
    stack.callback(restore, "forward", own)


def _run_edit(edit: Edit, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    return edit(inputs[0] if inputs else None, output)


def _submodule(module: nn.Module, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError as error:
        near = did_you_mean(name, dict(module.named_modules()))
        raise InputError(f"the backbone has no submodule {name!r} for an adapter's site{near}") from error
