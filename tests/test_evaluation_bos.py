# SPDX-License-Identifier: Apache-2.0
"""Tokenizers that begin every text with a token of their own: contexts begin with it, and so does what is kept."""

import json

import pytest
import torch
from evaluating import TASKS, Perfect, build, byte_tokenizer, run
from tiny import base_model, base_with_weights_of, rcc_model, text_config
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from rcc_hf.cli import main
from rcc_hf.evaluation.cost import cost_examples, evaluate_cost
from rcc_hf.evaluation.encoding import TextEncoder, encode_text, prefix_ids
from rcc_hf.evaluation.examples import Example
from rcc_hf.evaluation.methods import METHODS, make_method
from rcc_hf.evaluation.outputs import RunFolder
from rcc_hf.evaluation.perplexity import continuations
from rcc_hf.evaluation.settings import TaskSettings

SIZE = {"vocab_size": 260, "max_position_embeddings": 4096}
TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
EXAMPLE = Example(context="The sky is blue. " * 6, question="\nWhat?", answer="blue", max_new_tokens=5, task="t")


def bos_tokenizer(template="<s> $A"):
    """Bytes behind <s>, by default."""
    made = byte_tokenizer()
    made.add_special_tokens({"bos_token": "<s>"})
    special = [("<s>", made.bos_token_id), ("</s>", made.eos_token_id)]
    made.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def letters():
    return bos_tokenizer()


@pytest.fixture(scope="module")
def model():
    return rcc_model(text_config=text_config(**SIZE))


def test_what_a_tokenizer_puts_in_front_is_found(letters):
    bos = letters.bos_token_id
    assert prefix_ids(letters).tolist() == [bos]
    assert prefix_ids(bos_tokenizer("<s> $A </s>")).tolist() == [bos]
    assert prefix_ids(bos_tokenizer("$A </s>")).tolist() == prefix_ids(byte_tokenizer()).tolist() == []


@pytest.mark.real
def test_the_bundled_base_has_none():
    from rcc_hf.smollm import smollm2_path

    tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
    assert prefix_ids(tokenizer).tolist() == []
    # its template begins with its BOS, which belongs to the message
    _, prompt = TextEncoder(tokenizer, chat=True)(EXAMPLE)
    assert prompt[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("chat", [False, True])
def test_the_context_has_it_and_the_prompt_behind_it_has_not(chat, letters):
    context, prompt = TextEncoder(letters, chat=chat)(EXAMPLE)
    assert context.tolist() == letters(EXAMPLE.context)["input_ids"]
    assert letters.decode(prompt) == ("<user>What?</>" if chat else "\nWhat?")
    empty, _ = TextEncoder(letters)(Example(context="", question="?", answer="-", max_new_tokens=1))
    assert empty.tolist() == letters("")["input_ids"]
    cut, _ = TextEncoder(letters, max_context_length=5)(EXAMPLE)
    assert letters.decode(cut) == "<s>The "


@pytest.mark.parametrize("name", METHODS)
def test_methods_decode_behind_it_as_the_base_does_by_default(name, model, letters):
    context, prompt = TextEncoder(letters)(EXAMPLE)
    other, _ = TextEncoder(letters)(Example(context="Green? " * 9, question="?", answer="-", max_new_tokens=1))
    others = {"others": [other]} if name.startswith("wrong") else {}
    method = make_method(name, model, 4, prefix_length=1, **others)
    (found,) = method.generate(method.read([context]), [prompt], max_new_tokens=6, stop_ids=frozenset())
    read = other if name.startswith("wrong") else context
    size = method.budget(len(context))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    if name in ("rcc", "wrong-rcc"):
        plain = model.generate(prompt[None], memory=model.compress(read[None]), **options)[0, len(prompt) :]
    elif name == "mean-pool":
        plain = make_method(name, model, 4).generate(
            method.read([context]), [prompt], max_new_tokens=6, stop_ids=frozenset()
        )[0]
    else:
        text = letters("")["input_ids"] if name == "none" else letters(letters.decode(read[1:]))["input_ids"]
        kept = {"truncate-head": [*text[:1], *text[len(text) - size + 1 :]], "truncate-tail": text[:size]}
        kept["window-sink"] = [*text[:4], *text[len(text) - size + 4 :]]
        ids = torch.cat([torch.tensor(kept.get(name, text)), prompt])
        plain = base_with_weights_of(model).generate(ids[None], **options)[0, len(ids) :]
        assert ids[0] == letters.bos_token_id
    assert found.tolist() == plain.tolist()
    assert method.read([context]).num_entries == ({"full": len(context), "wrong": len(other), "none": 1}.get(
        name, method.budget(len(read))),)  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_lengths_count_it(task, letters, tmp_path):
    settings, names = TASKS[task]
    examples, encode = build(task, letters, tmp_path, **settings)
    for example in examples:
        context, _ = encode(example)
        assert context[0] == letters.bos_token_id
        assert len(context) == example.metadata.get("context_tokens", len(context))
        if task in ("passkey", "needles"):
            assert len(context) <= example.metadata["length"]
        assert "<s>" not in example.context + "".join(example.answers)
    # this one neither knows nor writes it
    metrics = run(Perfect(byte_tokenizer()), examples, encode, tmp_path / "run")
    assert [metrics[name] for name in names] == [1.0] * len(names)


def test_a_text_to_reconstruct_has_one_token_less(letters, tmp_path):
    (first, *_), encode = build("reconstruction", letters, tmp_path)
    read = len(encode(first)[0])
    assert read % 64 == 0
    assert first.answer == first.context[: read - 1]
    assert (first.metadata["scored_tokens"], first.max_new_tokens) == (read - 1, read - 1)
    assert first.metadata["text_tokens"] == len(encode_text(letters, first.context))


def test_documents_among_others_fill_whole_segments(letters, tmp_path):
    common = {"question": "?", "answer": "-", "max_new_tokens": 1}
    lines = [{"context": f"Box {i} is shut. " * 3, **common} for i in range(9)]
    (tmp_path / "boxes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    examples, encode = build("qa", letters, tmp_path, data=str(tmp_path / "boxes.jsonl"), context_tokens=192)
    assert {len(encode(example)[0]) for example in examples} == {192}


def test_histories_and_contexts_of_cost_begin_with_it(letters, model, tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "It is blue. " * 40}) + "\n")
    settings = TaskSettings(data=str(tmp_path / "t.jsonl"), lengths=[0, 32, 64], num_tokens=8, num_examples=2)
    made = continuations(letters, settings)
    assert [len(item.history) for item in made] == [1, 32, 64] * 2
    assert {int(item.history[0]) for item in made} == {letters.bos_token_id}
    texts = [letters.decode(torch.cat([item.history, item.target])[1:]) for item in made[:3]]
    assert texts[2].endswith(texts[1])
    assert texts[1].endswith(texts[0])
    method, read = make_method("full", model, 4), []
    plain = method.read
    method.read = lambda contexts: read.append(contexts[0]) or plain(contexts)
    with RunFolder(tmp_path / "cost", {}) as folder:
        made = cost_examples(TaskSettings(lengths=[40], num_tokens=2))
        evaluate_cost(model, letters, made, method, folder, num_runs=1, progress=False)
    assert {(len(ids), int(ids[0])) for ids in read} == {(40, letters.bos_token_id)}


@pytest.mark.parametrize("method", ["none", "full", "truncate-head"])
def test_the_command_line_keeps_it(method, letters, tmp_path):
    base_model(**SIZE).save_pretrained(tmp_path / "base")
    letters.save_pretrained(tmp_path / "base")
    arguments = ["--task", "passkey", "--lengths", "300", "--depths", "0.5", "--segment_length", "16", "--ratio", "4"]
    arguments += ["--fillers", "words", "--method", method, "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["evaluate", str(tmp_path / "base"), *arguments, "--no_progress"]) == 0
    row = json.loads((tmp_path / "out" / "predictions.jsonl").read_text())
    length = row["context_tokens"]
    assert 280 < length <= 300
    assert row["entries"] == {"none": 1, "full": length}.get(method, length // 16 * 4 + length % 16)
