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
    here = Path(__file__).parent
    try:
        commit, changes = (
            subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except FileNotFoundError:  # no git here
        commit, changes = "", ""
    called = Path(sys.argv[0])
    program = [called.name] if called.is_absolute() or called.suffix != ".py" else ["python", str(called)]
    is_cuda = torch.device(device).type == "cuda"
    return {
        "commit": commit or None,
        "uncommitted_changes": bool(changes),
        "command": [*program, *sys.argv[1:]],
        "versions": {
            "rcc_hf": RCC_VERSION,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "hardware": torch.cuda.get_device_name(device) if is_cuda else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }
