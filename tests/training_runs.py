# SPDX-License-Identifier: Apache-2.0
"""What tests of training share: settings, fresh models, and small data sets that need no tokenizer."""

import torch
from tiny import SEGMENT, rcc_model, tokens
from torch.utils.data import Dataset

from rcc_hf.objectives import IGNORED, reconstruction_example
from rcc_hf.training import RCCTrainer, TrainSettings
from rcc_hf.training.batches import Batches
from rcc_hf.training.parts import choose_parts
from rcc_hf.training.settings import training_arguments


class Examples(Dataset):
    """Two contexts, over and over: even a tiny model can learn them."""

    def __init__(self, size=64):
        self.contexts, self.size = tokens(2, SEGMENT), size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return reconstruction_example(self.contexts[index % 2], [1, 4])


class Mixed(Dataset):
    """Random by itself, as a mixture is: examples of a group share ratio, objective and number of segments.

    Labels are of different number in each example, and there is a text for a teacher.
    """

    is_shuffled = True

    def __init__(self, size=48, group=4, ratios=(4, 8), segments=(1, 2)):
        self.size, self.group, self.ratios, self.segments = size, group, ratios, segments

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if not 0 <= index < self.size:
            raise IndexError(index)
        kind = (index // self.group) % 2
        context = tokens(1, SEGMENT * self.segments[kind], seed=1000 + index)[0]
        local = tokens(1, 9, seed=index)[0]
        labels = local.clone()
        labels[: 1 + index % 5] = IGNORED
        teacher = torch.cat([context, local])
        teacher_labels = torch.cat([torch.full_like(context, IGNORED), labels])
        return {
            "context_ids": context,
            "input_ids": local,
            "labels": labels,
            "teacher_ids": teacher,
            "teacher_labels": teacher_labels,
            "ratio": self.ratios[kind],
            "objective": ("copy", "tell")[kind],
        }


class Long(Mixed):
    """The same, but every other group is of long texts."""

    def __getitem__(self, index):
        example = super().__getitem__(index)
        if (index // self.group) % 2:
            return example
        ids = tokens(1, 4 * SEGMENT, seed=2000 + index)[0]
        labels = ids.clone()
        labels[: SEGMENT + 1 + index % 3] = IGNORED
        return {"sequence_ids": ids, "labels": labels, "ratio": example["ratio"], "objective": "long"}


def settings(output, **changes):
    values = {"max_steps": 6, "batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 1, "save_steps": 3}
    return TrainSettings(output=str(output), **values | changes)


def fresh(tmp_path, dtype=torch.float32, **options):
    """A model whose checkpoints find their base in the folder."""
    model = rcc_model(dtype=torch.float32, **options)
    model.save_pretrained(tmp_path / "start")
    model.config.base_model_name_or_path = str(tmp_path / "start")
    return model.to(dtype)


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def trainer_of(model, how: TrainSettings, dataset=None) -> RCCTrainer:
    """A Trainer that has not begun."""
    choose_parts(model, how.train_parts)
    arguments = training_arguments(how, has_eval=False)
    return RCCTrainer(model=model, args=arguments, settings=how, train_dataset=dataset, data_collator=Batches())


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
