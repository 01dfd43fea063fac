"""What to tell a user about an error of jsonargparse: the same in fewer words, and the nearest name that there is."""

from __future__ import annotations

import re
from collections.abc import Collection

import pytorch_lightning.callbacks
import pytorch_lightning.loggers

import adaptive_merge
from adaptive_merge.cli.allowlist import OPTION
from adaptive_merge.cli.parser import near_option
from adaptive_merge.errors import did_you_mean

__all__ = ["explain"]

_CLASSES = (*adaptive_merge.__all__, *pytorch_lightning.callbacks.__all__, *pytorch_lightning.loggers.__all__)


def explain(error: Exception, options: Collection[str]) -> str:
    """What to tell the user about an error of the parser.

    Args:
        error: of jsonargparse.
        options: all that its parsers know.
    """
    message = str(error)
    if "denied by the" in message:
        advice = "Add the import path to import_path_allowlist in set_parsing_settings to allow it."
        own = f"A configuration can run what it names: if you trust it, add {OPTION} PACKAGE"
        return f"{message.replace(advice, '').strip()} {own}"
    if key := re.search(r"does not accept option '([^']+)'", message):
        known = [option.removeprefix("--") for option in options if option.startswith("--")]
        return message + did_you_mean(key[1], known)
    if name := re.search(r"Expected a dot import path string: (\w+)", message):
        return message + did_you_mean(name[1], _CLASSES)
    return message + near_option(message, options)
