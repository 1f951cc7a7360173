"""Results as files, with the machine and the commit in them."""

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from nestling.learner import machine


def commit() -> str | None:
    """The commit of the source tree this runs from, with + where it has changes; None outside of one."""
    here = Path(__file__).resolve().parent
    try:
        asked = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
        found = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def cpu() -> str:
    """The processor's name."""
    facts = Path("/proc/cpuinfo")
    for line in facts.read_text().splitlines() if facts.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def write_result(folder: Path, name: str, result: dict[str, Any]) -> None:
    """`folder`/`name`.json: the result, and before it the machine, its load and the commit."""
    where = machine() | {"cpu": cpu(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": where, "commit": commit()} | result, indent=2)
    (folder / f"{name}.json").write_text(text + "\n")
