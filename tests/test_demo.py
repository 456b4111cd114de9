# SPDX-License-Identifier: Apache-2.0
"""examples/demo.py: what it shows of a checkpoint, on a tiny one; and what it does without one."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
from shipping_tiny import trained_output

from rcc_hf.prose import Document

EXAMPLES = Path(__file__).parent.parent / "examples"
NOVEL = "\n\n".join(f"Chapter by chapter he walked {n} miles. Nobody spoke until {n} o'clock." for n in range(60))


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    spec = importlib.util.spec_from_file_location("demo", EXAMPLES / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "load_prose", lambda split: [Document("A Novel", NOVEL)])
    yield module
    for name in ("demo_fresh", "demo_printing"):
        sys.modules.pop(name, None)


@pytest.fixture
def tiny(tmp_path):
    base, folder = trained_output(tmp_path)
    return ["--checkpoint", str(folder), "--base", str(base), "--tokens", "1500", "--ratios", "16", "32"]


def test_it_shows_what_a_checkpoint_does(demo, tiny, capsys):
    demo.main([*tiny, "--ratio", "32", "--passage", "20"])
    out = capsys.readouterr().out
    assert re.search(r"nothing compressed +the base's logits, bit for bit\n", out)
    assert re.search(r"source tokens +1,4\d\d\n +memory slots +4[5-7] \(ratio 32\) and 0 raw tokens\n", out)
    assert re.search(r"bytes of a plain KV cache +[\d,]+ \(\d+\.\d times as much\)\n", out)
    assert len(re.findall(r"from \d slots \((?:16|32)x\)", out)) == 2
    assert len(re.findall(r"BLEU-4 +\d\.\d{3} of 20 tokens", out)) == 2
    assert [question in out for question, _ in demo.QUESTIONS] == [True] * 5
    assert re.search(r"the article +\d+ tokens: 1\d\d slots, [\d,]+ bytes from 16x; \d\d slots, ", out)
    assert len(re.findall(r"^   right (?:from 16x|from 32x|without the article) +0 of 5$", out, re.MULTILINE)) == 3
    assert re.search(r"appended +the article: 1,4\d\d tokens, then 3,\d{3}\n", out)
    assert "Done in" in out


def test_a_memory_that_was_saved_answers_as_before(demo, tiny, capsys):
    demo.main([*tiny, "--passage", "4"])
    answers = {name: re.search(rf"^   {name} +(.*)$", capsys_text, re.M)[1]
               for capsys_text in [capsys.readouterr().out] for name in ("from memory", "loaded")}  # fmt: skip
    assert answers["from memory"] == answers["loaded"] != ""


def test_the_article_holds_the_answers(demo):
    article = demo.ARTICLE.read_text(encoding="utf-8")
    assert all(answer in article for _, answer in demo.QUESTIONS)


def test_without_a_checkpoint_it_says_so_and_trains_one(demo, tmp_path, monkeypatch, capsys):
    import demo_fresh

    given = []
    monkeypatch.setattr(demo_fresh, "main", given.append)
    demo.main(["--checkpoint", str(tmp_path / "none")])
    assert given == [[]]
    assert f"There is no trained checkpoint in {tmp_path / 'none'}" in capsys.readouterr().out
