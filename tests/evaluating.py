# SPDX-License-Identifier: Apache-2.0
"""A perfect and a broken reader for the evaluation harness, a tokenizer of bytes, and examples of every task."""

import json
import random
import re
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from rcc_hf.evaluation.encoding import TextEncoder
from rcc_hf.evaluation.methods import ContextMethod, Reading
from rcc_hf.evaluation.outputs import RunFolder
from rcc_hf.evaluation.passages import ReconstructionEncoder
from rcc_hf.evaluation.processes import Processes
from rcc_hf.evaluation.runner import evaluate
from rcc_hf.evaluation.tasks import TaskSettings, build_examples
from rcc_hf.objectives import RECONSTRUCTION_PROMPT

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


TEXT = "It was a bright cold day, and the clocks were striking; number {} went home. Nobody spoke until {} o'clock."


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def texts_file(folder, count=4, length=700):
    generator = random.Random(0)
    made = []
    for _ in range(count):
        text = ""
        while len(text) < length:
            text += TEXT.format(generator.randrange(10**6), generator.randrange(10**6)) + " "
        made.append({"text": text})
    return write_rows(folder / "texts.jsonl", made)


def questions_file(folder):
    context = " ".join(SENTENCES)
    rows = [
        {"question": f"\nWhat is the colour of box {name}?", "answer": [colour], "context": context + " " * extra}
        for extra in (0, 3)
        for name, colour in (("one", "red"), ("two", "blue"))
    ]
    return write_rows(folder / "qa.jsonl", [{"max_new_tokens": 8, "answer_prefix": " It is", **row} for row in rows])


def build(task, letters, tmp_path, **settings):
    """Examples of a task and their encoder."""
    if task == "reconstruction":
        settings.setdefault("data", texts_file(tmp_path))
    if task == "qa":
        settings.setdefault("data", questions_file(tmp_path))
    made = TaskSettings(**settings)
    examples = build_examples(task, letters, made, segment_length=64, prompt=RECONSTRUCTION_PROMPT)
    if task == "reconstruction":
        prompt_ids = letters(RECONSTRUCTION_PROMPT)["input_ids"]
        return examples, ReconstructionEncoder(letters, prompt_ids)
    return examples, TextEncoder(letters)


TASKS = {
    "reconstruction": ({}, ("bleu4", "exact_match", "edit_similarity")),
    "passkey": (
        {"lengths": [400, 900], "fillers": ["repetitive", "words"], "key_types": ["number", "uuid"]},
        ("accuracy",),
    ),
    "needles": ({"lengths": [900], "key_types": ["uuid"], "num_needles": 3, "num_queries": 2}, ("string_match",)),
    "ruler": (
        {"lengths": [1500], "ruler_tasks": ["niah_single_1", "niah_multikey_2", "niah_multikey_3"], "num_examples": 2},
        ("string_match",),
    ),
    "qa": ({}, ("exact_match", "f1")),
}  # fmt: skip


def run(method, examples, encode, path, **options):
    options = {"progress": False, "config": {}} | options
    with RunFolder(path, options.pop("config"), process_index=options.get("processes", Processes()).index) as folder:
        return evaluate(method.model, method.tokenizer, examples, method, folder, encode=encode, **options)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
