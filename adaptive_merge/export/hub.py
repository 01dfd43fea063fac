"""An exported folder to the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from adaptive_merge.errors import InputError

__all__ = ["check_repository", "push"]

_REPOSITORY: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_repository(name: str) -> None:
    """InputError where `name` is not `<user or organisation>/<name>`; asked before anything is computed."""
    if not _REPOSITORY.fullmatch(name):
        raise InputError(f"--push {name}: a hub repository is named <user or organisation>/<name>")


def push(folder: str | Path, repository: str, private: bool = False) -> str:
    """Upload an exported folder in one commit; makes the repository where it is not there. Returns its address.

    Args:
        folder: as `export_model` wrote it.
        repository: `<user or organisation>/<name>`.
        private: of a repository that is made.

    Raises:
        InputError: no token, no right to write, or no network; the folder stays.
    """
    from huggingface_hub import HfApi

    check_repository(repository)
    try:
        client = HfApi()
        client.create_repo(repository, private=private, exist_ok=True)
        client.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export by adaptive_merge")
        return f"{client.endpoint}/{repository}"
    except Exception as error:  # the client raises its own kinds, those of its transport, and OSError
        reason = str(error).strip().splitlines() or ["no reason given"]
        raise InputError(
            f"{repository}: cannot be pushed to the hub ({type(error).__name__}: {reason[0]}); log in with `hf auth "
            f"login` or set HF_TOKEN, check the name and the network, or upload the folder {folder} yourself"
        ) from error
