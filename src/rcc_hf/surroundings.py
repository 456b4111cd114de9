# SPDX-License-Identifier: Apache-2.0
"""Where measured numbers come from: commit, command, versions and hardware, for the JSON beside them."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from rcc_hf.modeling.configuration_rcc import RCC_VERSION

__all__ = ["surroundings"]


def surroundings(device: str | torch.device = "cpu") -> dict[str, Any]:
    """JSON values that a result needs to be rerun and compared.

    Args:
        device: where the numbers were measured.
    """
    commit, changes = _commit()
    called = Path(sys.argv[0])
    program = [called.name] if called.is_absolute() or called.suffix != ".py" else ["python", str(called)]
    is_cuda = torch.device(device).type == "cuda"
    return {
        "commit": commit,
        "uncommitted_changes": changes,
        "command": [*program, *sys.argv[1:]],
        "versions": {
            "rcc_hf": RCC_VERSION,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "hardware": torch.cuda.get_device_name(device) if is_cuda else f"{_cpu_name()} CPU",
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def _commit() -> tuple[str | None, bool]:
    """The commit of the checkout that this file belongs to, and whether files differ from it; None outside of one."""
    folder = Path(__file__).parent
    is_ours = ["ls-files", "--error-unmatch", Path(__file__).name]
    commands = (is_ours, ["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
    output = []
    for command in commands:  # the first: a checkout around an environment with this library in it is another one
        try:
            done = subprocess.run(["git", "-C", folder, *command], capture_output=True, text=True, check=False)
        except FileNotFoundError:  # no git here
            return None, False
        if done.returncode:
            return None, False
        output.append(done.stdout.strip())
    return output[1], bool(output[2])


def _cpu_name() -> str:
    """The name that Linux knows; elsewhere, and where it knows none, the architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
