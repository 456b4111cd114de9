# SPDX-License-Identifier: Apache-2.0
"""The processes that share an evaluation: one alone, or several that `accelerate launch` or `torchrun` started."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch

from rcc_hf.optional import import_optional

__all__ = ["Processes", "close_processes", "join_processes"]

Item = TypeVar("Item")

# One process may wait for the others as long as the slowest of them evaluates.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Processes:
    """This process among those that share the work.

    Attributes:
        index: Of this one.
        count: Of all.
        device: Where this one computes; None: wherever the model is.
    """

    index: int = 0
    count: int = 1
    device: str | None = None

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Every `count`-th item, so that of a sorted list each process has long and short ones."""
        return items[self.index :: self.count]

    def wait(self) -> None:
        """Return when all have come here."""
        if self.count > 1:
            torch.distributed.barrier()


def join_processes() -> Processes:
    """This process among those that a launcher started; alone, where none did.

    Raises:
        ModuleNotFoundError: a launcher did, and accelerate is not installed.
    """
    distributed = torch.distributed
    if not distributed.is_available() or not (distributed.is_initialized() or distributed.is_torchelastic_launched()):
        return Processes()
    # Left to itself, accelerate takes several processes without a GPU for single ones.
    is_cpu = not torch.accelerator.is_available()
    state = import_optional("accelerate", "train").PartialState(cpu=is_cpu, timeout=_PATIENCE)
    return Processes(state.process_index, state.num_processes, str(state.device))


def close_processes(processes: Processes) -> None:
    """Leave the group; call it once, at the end of the program."""
    if processes.count > 1:
        torch.distributed.destroy_process_group()
