"""How a run appears in Weights & Biases: private, offline without a key, one run a folder, arrays together."""

from __future__ import annotations

import json
import logging
import netrc
import os
import secrets
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pytorch_lightning.loggers import Logger, WandbLogger

from adaptive_merge import upstream
from adaptive_merge.callbacks.show.sturdy import Sturdy
from adaptive_merge.files import save_json
from adaptive_merge.privacy import scrub
from adaptive_merge.runs.array import ARRAY

__all__ = ["FILE", "protect"]

FILE = "wandb.json"
_log = logging.getLogger(__name__)


def protect(logger: Logger, folder: str | Path, resumed: bool = False) -> Logger:
    """A logger that cannot stop the run; a `WandbLogger` also keeps to the run folder and says little.

    wandb then saves no git state, no code, no command line and no console output. Without an API key it is offline,
    and one line says how to upload. All attempts at a run have one id, offline too; runs of an array are a group.

    Args:
        logger: any Lightning logger.
        folder: the run folder.
        resumed: whether this is another attempt at a run.
    """
    if not isinstance(logger, WandbLogger):
        return Sturdy(logger)
    return Sturdy(logger, prepare=lambda: _prepare(logger, Path(folder), resumed))


def _prepare(logger: WandbLogger, folder: Path, resumed: bool) -> None:
    """Set what `wandb.init` will get, where the user has not set it."""
    # Tables are staged as files, in the user's home unless told otherwise; there is no setting for it, and wandb
    # reads its environment when it is first used.
    os.environ.setdefault("WANDB_DATA_DIR", str(folder / "wandb" / "staging"))
    options = upstream.wandb_options(logger)
    offline = _is_offline(logger, options)
    # What the user says about the run, such as notes and a configuration, is written and uploaded with it.
    options |= {name: scrub(value, name) for name, value in options.items() if name != "settings"}
    options["settings"] = _settings(options.get("settings"), offline)
    options["dir"] = str(folder)
    if offline:
        options["mode"] = "offline"
    if options.get("anonymous") is None:
        options.pop("anonymous", None)
    _name(options, folder, resumed)
    upstream.redirect(logger)
    if offline:
        _log.warning("wandb is offline; to upload this run: wandb sync %s", folder / "wandb" / "offline-run-*")


def _settings(chosen: Any, offline: bool) -> Any:
    """Private settings, under those that the user gave, also by environment variables."""
    import wandb

    private = {
        "disable_git": True,
        "save_code": False,
        "disable_code": True,
        "console": "off",
        "silent": offline,
        "x_disable_meta": True,
        "x_save_requirements": False,
        "init_timeout": 30,
    }
    if chosen is None or isinstance(chosen, dict):
        explicit = dict(chosen or {})
    else:
        explicit = {name: getattr(chosen, name) for name in chosen.model_fields_set}
    # What is set here would win over wandb's environment variables.
    defaults = {name: value for name, value in private.items() if f"WANDB_{name.upper()}" not in os.environ}
    return wandb.Settings(**defaults | explicit)


def _is_offline(logger: WandbLogger, options: dict[str, Any]) -> bool:
    mode = options.get("mode") or os.environ.get("WANDB_MODE")
    if mode:
        return mode in ("offline", "dryrun")
    return upstream.is_offline(logger) or not _has_key()


def _has_key() -> bool:
    """Whether wandb could log in: a key in the environment or in the netrc file. Nothing is asked over the network."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    for path in (os.environ.get("NETRC"), Path.home() / ".netrc", Path.home() / "_netrc"):
        try:
            if path and netrc.netrc(path).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _name(options: dict[str, Any], folder: Path, resumed: bool) -> None:
    """One id a folder, which wandb resumes: at once where it is online, else when the attempts are uploaded."""
    path, place = folder / FILE, folder.resolve()
    known = _known(path) if resumed else None
    array = place.parent.name if (place.parent / ARRAY).is_file() else None
    # What is set here would win over wandb's environment variables.
    options["id"] = options.get("id") or os.environ.get("WANDB_RUN_ID") or known or secrets.token_hex(4)
    options["name"] = options.get("name") or os.environ.get("WANDB_NAME") or place.name
    options["group"] = options.get("group") or os.environ.get("WANDB_RUN_GROUP") or array
    options["resume"] = "allow"
    save_json(path, {"id": options["id"]})


def _known(path: Path) -> str | None:
    """The id under which this folder's run was logged before."""
    try:
        return str(json.loads(path.read_text())["id"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
