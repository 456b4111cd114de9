# SPDX-License-Identifier: Apache-2.0
"""Questions that are compressed with the context: in the words of training, and answers behind written instructions."""

import json

import numpy as np
import pytest
import torch
from evaluating import Perfect, questions_file, rows_of, run
from objective_data import EOS, chat_tokenizer, local_parts, questions, shape
from tiny import rcc_model, text_config

from rcc_hf.cli import main
from rcc_hf.evaluation.benchmark_qa import questions as evaluation_questions
from rcc_hf.evaluation.examples import Example
from rcc_hf.evaluation.instructions import FOLLOW_CUE, REPEAT_CUE, InstructionEncoder, WrittenInstructions
from rcc_hf.evaluation.tasks import GROUP_BY, TaskSettings, build_examples
from rcc_hf.objectives import Instructions

LETTERS = chat_tokenizer()
ROWS = questions()
STOPS = frozenset({EOS, *LETTERS("<|im_end|>")["input_ids"]})
ASKED = Example(
    context="abc", question="\n\nHow old? ", answer_prefix="Answer:", answer="7", max_new_tokens=4, task="t"
)
MARKED = Example(
    context="abc", question="\nA: 1\nAnswer: 2\nB?\n", answer_prefix="Answer:", answer="7", max_new_tokens=4, task="t"
)
BARE = Example(context="abc", question="Count:", answer="7", max_new_tokens=4, task="t")
LINE = Example(context="abc", question="Count:\n", answer="7", max_new_tokens=4, task="t")


def ids(text):
    return torch.tensor(LETTERS(text)["input_ids"])


def asked(row):
    record = {"context": row.context, "question": row.question, "answers": list(row.answers)}
    return next(evaluation_questions(record, "t"))


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("mode", ["reconstructed", "compressed"])
def test_contexts_and_prompts_are_those_of_training(mode, chat):
    objective = Instructions(
        ROWS, LETTERS, mode=mode, chat_share=float(chat), alone_share=1.0, max_answer=99, progress=False
    )
    encode, seen = InstructionEncoder(LETTERS, mode, chat=chat), 0
    for seed in range(12):
        trained = objective.example(np.random.default_rng(seed), shape(1, 256))
        text = trained["context_ids"][trained["context_ids"] != EOS]
        row = next(row for row in ROWS if row.context in LETTERS.decode(text))
        if not LETTERS.decode(text).startswith(row.context):
            continue  # the instruction stands in front, where evaluation has none
        seen += 1
        example = InstructionEncoder.with_question(asked(row))
        context, prompt = encode(example)
        assert torch.equal(context, text)
        assert LETTERS.decode(context) == example.context
        given, written = local_parts(LETTERS, trained)
        assert LETTERS.decode(prompt) == given
        if mode == "reconstructed":
            made = ids(written)
            answer, columns = WrittenInstructions(LETTERS, chat=chat).read(example, made, STOPS)
            assert answer.strip() in row.answers
            assert columns == {"instruction": example.question.strip(), "instruction_match": 1.0}
    assert 2 < seen < 11


def test_words_that_ask():
    plain, chat = (
        LETTERS.decode(InstructionEncoder(LETTERS, "reconstructed", chat=chat)(ASKED)[1]) for chat in (False, True)
    )
    assert (plain, chat) == (REPEAT_CUE, "<|im_start|>user\n")
    plain, chat = (
        LETTERS.decode(InstructionEncoder(LETTERS, "compressed", chat=chat)(ASKED)[1]) for chat in (False, True)
    )
    assert plain == FOLLOW_CUE + "Answer:"
    assert chat == f"<|im_start|>user\n{FOLLOW_CUE.strip()}<|im_end|>\n<|im_start|>assistant\nAnswer:"


def test_a_long_context_loses_its_end_and_not_the_question():
    encode = InstructionEncoder(LETTERS, "compressed", max_context_length=2)
    assert LETTERS.decode(encode(InstructionEncoder.with_question(ASKED))[0]) == "ab\n\nHow old?"


def test_what_cannot_be_encoded_is_refused():
    with pytest.raises(ValueError, match="mode is 'typed'"):
        InstructionEncoder(LETTERS, "typed")
    with pytest.raises(ValueError, match="has no question that could be compressed"):
        InstructionEncoder.with_question(Example(context="c", question=" ", answer="a", max_new_tokens=1))
    empty = chat_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(ValueError, match="nothing in front of a user's message"):
        InstructionEncoder(empty, "reconstructed", chat=True)(ASKED)


CHAT = "<|im_end|>\n<|im_start|>assistant\nAnswer:"


@pytest.mark.parametrize(
    ("example", "chat", "made", "answer", "instruction", "is_exact"),
    [
        (ASKED, False, "How old? Answer: 7</s> or 8", " 7", "How old?", True),
        (ASKED, False, "How odd? Answer: 7</s>", " 7", "How odd?", False),
        (ASKED, False, "How old? Answer: 123456", " 123", "How old?", True),
        (ASKED, False, "How old? It is 7", "", "How old? It is 7", False),
        (ASKED, False, "How old?</s> Answer: 7", "", "How old?", False),
        (ASKED, True, f"How old?{CHAT} 7<|im_end|>\nMore", " 7", "How old?", True),
        (ASKED, True, f"How odd?{CHAT} 7<|im_end|>", " 7", "How odd?", False),
        (ASKED, True, f"How<|im_end|>\n{CHAT} 7<|im_end|>", "", "How<|im_end|>\n", False),
        (MARKED, False, "A: 1\nAnswer: 2\nB?\nAnswer: 7</s>", " 7", "A: 1\nAnswer: 2\nB?", True),
        (BARE, False, "Count: 7</s>", " 7", "Count:", True),
        (BARE, False, "County 7</s>", "", "County 7", False),
        (BARE, False, "", "", "", False),
        (LINE, False, "Count:\n7</s>", "7", "Count:\n", True),
        (LINE, False, "One\nCount:\n7</s>", "7", "One\nCount:\n", False),
    ],
)  # fmt: skip
def test_answers_stand_behind_what_the_decoder_has_written(example, chat, made, answer, instruction, is_exact):
    found = WrittenInstructions(LETTERS, chat=chat).read(example, ids(made).long(), STOPS)
    assert found == (answer, {"instruction": instruction, "instruction_match": float(is_exact)})


class Writing(Perfect):
    """Writes the instruction that the text ends with, one of them wrong, and then what the text says about it."""

    between = ""

    def generate(self, *arguments, stop_ids, **options):
        found = super().generate(*arguments, stop_ids=stop_ids, **options)
        ends = [next((i for i, one in enumerate(row.tolist()) if one in stop_ids), len(row)) for row in found]
        return [row[:end] for row, end in zip(found, ends, strict=True)]

    def answer(self, context, prompt):
        assert prompt == ("<|im_start|>user\n" if self.between else REPEAT_CUE)
        question = context.rpartition("\n\n")[2]
        answer = super().answer(context, question)
        return question.replace("two", "tow") + f"{self.between} It is {answer}</s> and more"


@pytest.mark.parametrize("chat", [False, True])
def test_the_metric_looks_at_the_answer_alone(chat, tmp_path):
    found = build_examples("qa", LETTERS, TaskSettings(data=questions_file(tmp_path)))
    examples = [InstructionEncoder.with_question(example) for example in found]
    encode, method = InstructionEncoder(LETTERS, "reconstructed", chat=chat), Writing(LETTERS)
    method.between = CHAT.removesuffix("Answer:") if chat else ""
    options = {"answers": WrittenInstructions(LETTERS, chat=chat), "stop_ids": STOPS, "group_by": GROUP_BY["qa"]}
    metrics = run(method, examples, encode, tmp_path / "run", **options)
    assert (metrics["f1"], metrics["exact_match"], metrics["instruction_match"]) == (1.0, 1.0, 0.5)
    assert metrics["overall"]["instruction_match"]["stderr"] > 0
    assert metrics["groups"][0]["instruction_match"]["mean"] == 0.5
    assert sum(map(len, method.read_batches)) == 4  # each question has a text of its own
    rows = rows_of(tmp_path / "run")
    assert [row["instruction_match"] for row in rows] == [1, 0, 1, 0]
    assert rows[1]["instruction"] == "What is the colour of box tow?"


# rcc evaluate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("instructions")
    sizes = {"vocab_size": 260, "max_position_embeddings": 4096}
    rcc_model(dtype=torch.float32, text_config=text_config(**sizes)).save_pretrained(root / "rcc")
    LETTERS.save_pretrained(root / "rcc")
    questions_file(root)
    return root


def evaluate(folder, output, *arguments, task="qa"):
    given = ["--task", task, "--data", str(folder / "qa.jsonl"), "--output", str(output), "--no_progress"]
    status = main(["evaluate", str(folder / "rcc"), *given, "--device", "cpu", *map(str, arguments)])
    file = output / "metrics.json"
    return status, json.loads(file.read_text()) if file.exists() else None


def instructed(mode, *further):
    return ("--instruction", mode, "--fill_segments", *further)


@pytest.mark.parametrize("mode", ["typed", "compressed", "reconstructed"])
@pytest.mark.parametrize("method", ["rcc", "wrong-rcc"])
def test_every_mode_is_measured_and_recorded(mode, method, folder, tmp_path):
    status, metrics = evaluate(folder, tmp_path, *instructed(mode, "--method", method, "--chat"))
    config = json.loads((tmp_path / "config.json").read_text())
    assert status == 0
    expected = None if mode == "typed" else mode
    assert (metrics.get("instruction"), config.get("instruction")) == (expected, expected)
    assert ("instruction_match" in metrics) == (mode == "reconstructed")
    assert metrics["num_examples"] == 4
    rows = [json.loads(line) for line in (folder / "qa.jsonl").read_text().splitlines()]
    texts = [len(row["context"]) + (mode != "typed") * len("\n\n" + row["question"].strip()) for row in rows]
    if method == "rcc":
        assert metrics["context_tokens_per_example"] == sum(texts) / 4
    assert metrics["entries_per_example"] * 4 % 4 == 0  # slots alone: 4 a segment
    assert [row["question"] for row in rows_of(tmp_path)] == [row["question"] for row in rows]


def test_a_run_does_not_go_on_in_another_mode(folder, tmp_path, capsys):
    first = evaluate(folder, tmp_path, *instructed("compressed"))
    assert evaluate(folder, tmp_path, *instructed("compressed")) == first
    for other, message in (("reconstructed", '"compressed" there, "reconstructed" here'), ("typed", "absent here")):
        assert evaluate(folder, tmp_path, *instructed(other))[0] == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "arguments", "message"),
    [
        ("qa", instructed("compressed", "--method", "full"), "is for the methods that compress, rcc, wrong-rcc"),
        ("qa", ("--instruction", "reconstructed"), "instruction=reconstructed needs fill_segments"),
        ("passkey", instructed("compressed"), "instruction=compressed is for qa, benchmark, and the task is passkey"),
    ],
)
def test_where_no_question_can_be_compressed(task, arguments, message, folder, tmp_path, capsys):
    assert evaluate(folder, tmp_path / "out", *arguments, task=task) == (2, None)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
