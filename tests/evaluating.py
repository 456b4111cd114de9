# SPDX-License-Identifier: Apache-2.0
"""A perfect and a broken reader for the evaluation harness, and a tokenizer of bytes."""

import re
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from rcc_hf.evaluation.methods import ContextMethod, Reading

SENTENCES = [f"The colour of box {name} is {colour}." for name, colour in (("one", "red"), ("two", "blue"))]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token; 256 ends a text."""
    alphabet = {letter: index for index, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(alphabet, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


class Perfect(ContextMethod):
    """Keeps the text and finds the answer by searching it."""

    name = "perfect"
    _start = _split = None

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.model = SimpleNamespace(device=torch.device("cpu"), generation_config=None)
        self.read_batches, self.asked = [], 0

    def read(self, contexts):
        self.read_batches.append([len(context) for context in contexts])
        sizes = tuple(map(len, contexts))
        return Reading(tuple(4 * size for size in sizes), sizes, tuple(contexts))

    def generate(self, reading, prompts, *, max_new_tokens, stop_ids):
        self.asked += len(prompts)
        texts = [self.tokenizer.decode(ids) for ids in reading.kept]
        answers = [self.answer(text, self.tokenizer.decode(p)) for text, p in zip(texts, prompts, strict=True)]
        return [torch.tensor(self.tokenizer(answer)["input_ids"])[:max_new_tokens] for answer in answers]

    def answer(self, context, prompt):
        """What the context says about what is asked."""
        if "Repeat the text" in prompt:
            return context
        if "pass key" in prompt:
            return re.search(r"The pass key is (\S+)\. ", context)[1]
        if "colour" in prompt:
            asked = re.search(r"box (\w+)", prompt)[1]
            return re.search(rf"colour of box {asked} is (\w+)\.", context)[1]
        found = re.findall(r"magic (?:number|uuid|UUID)s? (?:of|for) (\S+) is:? (\S+)\.", context)
        return ", ".join(value for name, value in found if re.search(rf"\b{re.escape(name)}\b", prompt))


class Broken(Perfect):
    """Has read nothing."""

    name = "broken"

    def answer(self, context, prompt):
        return "I am sorry, but here is 12345 instead, or 00000000-0000-4000-8000-000000000000"
