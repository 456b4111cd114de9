# SPDX-License-Identifier: Apache-2.0
"""The rcc command: help, and errors that a user can cause."""

import re

import pytest

from rcc_hf.cli import COMMANDS, main
from rcc_hf.training import explain


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert [name for name in COMMANDS if f"  {name} " not in shown] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_defaults(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: rcc {name}" in shown
    assert re.search(r"\(default: (?!None)", shown)


def test_numbers_of_the_log_are_explained(capsys):
    assert main(["train", "--help-metrics"]) == 0
    assert "eval_bleu4_r<ratio>\n    Corpus BLEU-4" in capsys.readouterr().out
    assert explain("eval_bleu4_r32") == explain("eval_bleu4_r<ratio>")
    with pytest.raises(ValueError, match="nothing named 'eval_bleu4_rx'"):
        explain("eval_bleu4_rx")


def test_an_unknown_command_names_the_known_ones(capsys):
    assert main(["compres"]) == 2
    assert "'compres'; the commands are convert, tokenize, train, compress, generate" in capsys.readouterr().err


def test_an_error_of_the_user_is_a_message_not_a_traceback(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    assert main(["compress", str(tmp_path / "model"), "absent.txt", str(tmp_path / "out")]) == 2
    assert "rcc compress: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "m", "hello", "--memory", "a", "--context", "b"], "not both"),
        (["generate", "m", ""], "give a prompt"),
        (["generate", "m", "hello", "--reconstruct"], "give a prompt, or --reconstruct"),
        (["train", "m", "--output", "o", "--max-steps", "0"], "max_steps=0"),
    ],
)
def test_contradictions_are_refused_before_anything_is_loaded(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
