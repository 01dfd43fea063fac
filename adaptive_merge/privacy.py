"""Keeping secrets out of what a run writes: hyperparameters, dashboards, reports."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["HIDDEN", "scrub"]

HIDDEN = "(hidden)"
_NAME = re.compile(r"token(?!i[sz])|secret|passw|credential|api_?key|(^|[_.\-])keys?$", re.IGNORECASE)
_USER_IN_URL = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
_SHORTEST = 8  # shorter values of secret variables, such as "0" or "true", would blank half a file


def scrub(value: Any, name: str = "") -> Any:
    """A copy of nested settings without secrets.

    Hidden are the values of names such as `token`, `api_key` or `password`, the values of environment variables of
    such names wherever they occur, and the user and password in addresses.
    """
    if isinstance(value, Mapping):
        return {key: scrub(part, str(key)) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [scrub(part, name) for part in value]
    if value is None or isinstance(value, (bool, float)):  # nobody's secret is a fraction
        return value
    if _NAME.search(name):
        return HIDDEN
    return _scrub_text(value) if isinstance(value, str) else value


def _scrub_text(text: str) -> str:
    for name, secret in os.environ.items():
        if len(secret) >= _SHORTEST and _NAME.search(name):
            text = text.replace(secret, HIDDEN)
    return _USER_IN_URL.sub(HIDDEN, text)
