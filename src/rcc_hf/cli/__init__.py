# SPDX-License-Identifier: Apache-2.0
"""The `rcc` command: finds the subcommand and hands over."""

import importlib
import sys

COMMANDS = {
    "convert": "put a fresh compressor on a base model",
    "tokenize": "tokenize texts into shards on disk, to train from",
    "train": "train a compressor to reconstruct text",
    "compress": "compress a text into a memory and save it",
    "generate": "generate text, behind a memory or a long context",
    "chat": "chat for as long as you like, in bounded memory",
    "evaluate": "measure a model on a task",
    "plot": "draw results of evaluations",
}


def main(argv: list[str] | None = None) -> int:
    """Run `rcc <command> ...`; errors that a user can cause end it with status 2 and their message."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: rcc COMMAND ...\n\ncommands (each has --help):")
        for name, purpose in COMMANDS.items():
            print(f"  {name:10} {purpose}")
        return 0 if argv else 2
    name, *rest = argv
    if name not in COMMANDS:
        print(f"rcc: there is no command {name!r}; the commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    command = importlib.import_module(f"rcc_hf.cli.{name}")  # only what is run is imported: --help stays fast
    try:
        return command.run(rest)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"rcc {name}: {error}", file=sys.stderr)
        return 2
