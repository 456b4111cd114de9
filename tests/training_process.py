# SPDX-License-Identifier: Apache-2.0
"""One process of a training run that several share; started by `torchrun`. Arguments: folder, batch size, steps,
accumulation, and the gradient engine if every other batch is of long texts."""

import sys
from pathlib import Path

import torch
from training_runs import Long, Mixed, fresh, settings

from rcc_hf.training import train

if __name__ == "__main__":
    folder, batch_size, steps, accumulation = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    engine = sys.argv[5] if len(sys.argv) > 5 else None
    how = settings(
        folder / "out",
        batch_size=batch_size,
        max_steps=steps,
        accumulation_steps=accumulation,
        distillation_weight=0.5 if engine is None else 0.0,
        gradient_engine=engine,
        logging_steps=1,
    )
    # batches of a step are of both kinds where processes have batches of their own
    examples = Mixed(size=how.max_steps * 8, group=8) if engine is None else Long(size=how.max_steps * 8, group=4)
    train(fresh(folder), how, examples, Mixed(size=8, group=8) if engine is None else None)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
