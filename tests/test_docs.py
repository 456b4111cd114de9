# SPDX-License-Identifier: Apache-2.0
"""What the documentation shows runs as it stands there, on the real model."""

import io
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rcc_hf.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

pytestmark = pytest.mark.real


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands(program):
    lines = [line for block in blocks("console") for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith(f"{program} ")]


@torch.no_grad()
def differing_logits(names):
    """By how much the model prefers one of two continuations where they part: nothing but a near tie in bfloat16."""
    fast, answer = names["fast"][0], names["answer"][0]
    if torch.equal(fast, answer):
        return 0.0
    place = int((fast != answer).nonzero()[0])
    logits = names["model"](answer[None, :place], memory=names["memory"]).logits[0, -1].float()
    return abs(float(logits[fast[place]] - logits[answer[place]]))


def test_python_of_the_readme_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile("\n".join(blocks("python")), "README.md", "exec"), names)  # our own text
    assert names["memory"].num_slots == 64
    assert names["longer"].num_tokens == 2 * names["memory"].num_tokens
    assert names["answer"].shape[1] == names["question"].shape[1] + 8
    assert names["output"].shape[1] == names["context"].shape[1] + 8
    assert differing_logits(names) <= 0.25
    seen = sum(names[name].shape[1] for name in ("system", "context", "question"))
    assert seen < names["stream"].num_tokens <= seen + 8


@pytest.mark.filterwarnings("ignore:.*use_return_dict.*:FutureWarning")
def test_commands_of_the_readme_run_in_order(tmp_path, monkeypatch, capsys):
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who are you?\n/status\n/quit\n"))  # for rcc chat
    found = commands("rcc")
    assert {arguments[0] for arguments in found} == set(COMMANDS)
    for arguments in found:
        assert main(arguments) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "eval_token_accuracy" in out
    assert re.search(r"plain KV cache: [\d,]+, [34]\.\d times as much", out)


def test_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in {arguments[0] for arguments in commands("make")}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_files_that_the_documents_link_to_exist():
    for document in (
        "README.md",
        "CONTRIBUTING.md",
        *(str(file.relative_to(ROOT)) for file in (ROOT / "docs").glob("*.md")),
    ):
        text = (ROOT / document).read_text()
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (ROOT / document).parent.joinpath(target).exists(), f"{document}: {target}"


def test_the_file_tables_of_the_architecture_are_complete():
    text = (ROOT / "docs/architecture.md").read_text()
    for folder in ("modeling", "src/rcc_hf"):
        for file in (ROOT / folder).glob("*.py"):
            assert (folder == "modeling" and file.name == "__init__.py") or f"`{file.name}`" in text, file


def test_the_demo_without_a_checkpoint_runs(tmp_path):
    command = [
        sys.executable,
        ROOT / "examples" / "demo_fresh.py",
        "--steps",
        "2",
        "--passages",
        "2",
        "--tokens",
        "150",
    ]
    done = subprocess.run([*command, "--output", tmp_path / "out"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"before training +0\.\d{3}\n +after \d+ s of training +0\.\d{3}", done.stdout)
    assert re.search(r"source tokens +150\n +memory slots +32 \(ratio 4\) and 22 raw tokens", done.stdout)
    assert (tmp_path / "out" / "config.json").exists()
