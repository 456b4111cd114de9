# SPDX-License-Identifier: Apache-2.0
"""One process of a training run that several share; started by `torchrun`. Arguments: folder, batch size, steps,
accumulation."""

import sys
from pathlib import Path

import torch
from training_runs import Mixed, fresh, settings

from rcc_hf.training import train

if __name__ == "__main__":
    folder, batch_size, steps, accumulation = Path(sys.argv[1]), *map(int, sys.argv[2:])
    how = settings(
        folder / "out",
        batch_size=batch_size,
        max_steps=steps,
        accumulation_steps=accumulation,
        distillation_weight=0.5,
        logging_steps=1,
    )
    examples = Mixed(size=how.max_steps * 8, group=8)
    train(fresh(folder), how, examples, Mixed(size=8, group=8))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
