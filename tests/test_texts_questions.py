# SPDX-License-Identifier: Apache-2.0
"""Rows with questions, and with conversations: what they may look like, and errors that say where."""

import json

import datasets
import pytest

from rcc_hf.texts import ChatRow, QARow, read_chat_rows, read_qa_rows

QA = {"context": "c", "question": "q", "answer_prefix": "p", "answer": "a", "max_new_tokens": 3}
TALK = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]


def lines(tmp_path, *rows):
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def without(row, *names):
    return {name: value for name, value in row.items() if name not in names}


def test_questions_with_one_answer_or_several(tmp_path):
    bare = without(QA, "answer", "answer_prefix", "max_new_tokens")
    several = [bare | {"answer": ["a", "b"]}, bare | {"answers": ["a", "b"]}, bare | {"answers": {"text": ["a", "b"]}}]
    found = read_qa_rows(lines(tmp_path, QA | {"id": 7}, *several))
    assert found[0] == QARow(context="c", question="q", answer_prefix="p", answers=("a",), max_new_tokens=3)
    assert found[1:] == [QARow(context="c", question="q", answers=("a", "b"))] * 3
    assert {row.answer for row in found} == {"a"}


def test_questions_about_one_context_share_it(tmp_path):
    first, second = read_qa_rows(lines(tmp_path, QA | {"context": "long " * 99}, QA | {"context": "long " * 99}))
    assert first.context is second.context


def test_questions_of_a_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = lines(tmp_path, QA, QA | {"answer": "b"})
    assert read_qa_rows(f"datasets:json?data_files={file}") == read_qa_rows(file)
    with pytest.raises(ValueError, match="field is for texts"):
        read_qa_rows("datasets:x?field=text")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (without(QA, "context"), "context missing; found question, answer_prefix, answer, max_new_tokens"),
        (without(QA, "question", "answer"), "question, answer missing"),
        ({}, "found nothing"),
        (QA | {"context": None}, r"context is 'None' \(NoneType\); it must be a string"),
        (QA | {"answer": []}, "answer is .* it must be a string or a list of strings, none of them empty"),
        (QA | {"answer": ["a", ""]}, "none of them empty"),
        (QA | {"answer": 5}, r"answer is '5' \(int\)"),
        (QA | {"max_new_tokens": 0}, "max_new_tokens is '0' .* a positive integer"),
        (QA | {"max_new_tokens": True}, "max_new_tokens is 'True'"),
    ],
)
def test_what_is_no_question_says_where_and_why(tmp_path, row, message):
    with pytest.raises(ValueError, match=rf"x\.jsonl, line 2: .*{message}"):
        read_qa_rows(lines(tmp_path, QA, row))


def test_conversations(tmp_path):
    talk = [{"role": "system", "content": ""}, *TALK, {"role": "tool", "content": "4", "name": "sum"}]
    found = read_chat_rows(lines(tmp_path, {"messages": TALK}, {"messages": talk, "context": "c", "id": 1}))
    assert found == [ChatRow(messages=tuple(TALK)), ChatRow(messages=tuple(talk), context="c")]
    assert found[0].context is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"message": TALK}, "messages missing; found message"),
        ({"messages": []}, 'messages is .* a list of {"role": ..., "content": ...}, with one or more'),
        ({"messages": "hello"}, "messages is 'hello'"),
        ({"messages": ["hello"]}, "message 1 is 'hello' .* an object"),
        ({"messages": [TALK[0], {"role": "assistant"}]}, "content of message 2 is 'None'"),
        ({"messages": [{"content": "x"}]}, "role of message 1 is 'None'"),
        ({"messages": TALK[:1]}, "in which the role assistant says something"),
        ({"messages": TALK, "context": 3}, r"context is '3' \(int\)"),
    ],
)
def test_what_is_no_conversation_says_where_and_why(tmp_path, row, message):
    with pytest.raises(ValueError, match=rf"x\.jsonl, line 2: .*{message}"):
        read_chat_rows(lines(tmp_path, {"messages": TALK}, row))


@pytest.mark.parametrize("read", [read_qa_rows, read_chat_rows])
def test_files_without_rows_are_errors(tmp_path, read):
    with pytest.raises(ValueError, match="holds no rows"):
        read(lines(tmp_path))
    with pytest.raises(ValueError, match=r"x\.json is no \.jsonl file"):
        read(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "absent.jsonl")
