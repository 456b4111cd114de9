# SPDX-License-Identifier: Apache-2.0
"""On what something was measured: hardware, versions, and the commit of this library."""

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers

import rcc_hf

__all__ = ["describe_environment"]


def describe_environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """JSON values that say what a number depends on beside the settings.

    Args:
        device: Where the model is.
    """
    device = torch.device(device)
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "device_type": device.type,
        "num_devices": torch.cuda.device_count() if device.type == "cuda" else 1,
        "cpu_count": os.cpu_count(),
        "cpu_threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "rcc_hf": rcc_hf.__version__,
        "commit": _commit(Path(__file__).parent),
    }
    return found


def _cpu_name() -> str:
    """The name that Linux knows; elsewhere, and where it knows none, the architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _commit(folder: Path) -> str | None:
    """The commit of the checkout that this file belongs to, with "-dirty" where it differs; None outside of one."""
    if shutil.which("git") is None:
        return None
    # A checkout around an environment in which this library is installed is another one.
    is_ours = ["ls-files", "--error-unmatch", Path(__file__).name]
    for command in (is_ours, ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]):
        done = subprocess.run(["git", "-C", folder, *command], capture_output=True, text=True, check=False)
        if done.returncode:
            return None
    return done.stdout.strip()
