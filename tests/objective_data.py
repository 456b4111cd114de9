# SPDX-License-Identifier: Apache-2.0
"""A tokenizer of bytes with a chat template, and documents, questions and checks for objectives."""

import random

import numpy as np
import torch
from evaluating import byte_tokenizer

from rcc_hf.objectives import IGNORED, Shape
from rcc_hf.texts import QARow, TokenShards

EOS = 256
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat_tokenizer(template=CHATML):
    """Bytes, 256 for the end of a text, 257 and 258 for `<|im_start|>` and `<|im_end|>`."""
    made = byte_tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = template
    return made


def shape(num_segments=2, segment_length=64, ratio=4):
    return Shape(num_segments=num_segments, segment_length=segment_length, ratio=ratio)


def counting(*lengths):
    """Documents whose ids are 1000 times their number plus their place: what was drawn can be read off."""
    return TokenShards.of_documents([1000 * (i + 1) + np.arange(n) for i, n in enumerate(lengths)])


def prose_shards(tokenizer, length=3000):
    generator = random.Random(0)
    text = " ".join(f"Sentence {generator.randrange(900)} says nothing at all." for _ in range(length // 30))
    return TokenShards.of_documents([tokenizer(text)["input_ids"]])


def questions(count=12):
    """Rows whose answers stand in their own contexts only."""
    names = ["Ada", "Bert", "Cleo", "Dora", "Egon", "Fay", "Gus", "Hal", "Ida", "Jan", "Kim", "Lou"][:count]
    return [
        QARow(
            context=f"{name} lives alone. The house of {name} is number {700 + i}. It is old." + " Very old." * (i % 3),
            question=f"Which number has the house of {name}?",
            answers=(str(700 + i), f"seven hundred and {i}"),
        )
        for i, name in enumerate(names)
    ]


def decode(tokenizer, ids):
    return tokenizer.decode(torch.as_tensor(ids).tolist())


def labelled(example, which=""):
    """The ids that are predicted, of the example or (`teacher_`) its teacher."""
    labels = example[f"{which}labels"]
    return labels[labels != IGNORED].tolist()


def local_parts(tokenizer, example):
    """Texts of what is given and what is predicted, where the predicted tokens end the example."""
    first = int((example["labels"] != IGNORED).nonzero()[0])
    assert (example["labels"][first:] == example["input_ids"][first:]).all()
    return decode(tokenizer, example["input_ids"][:first]), decode(tokenizer, example["input_ids"][first:])


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[k], other[k]) if torch.is_tensor(one[k]) else one[k] == other[k] for k in one)
