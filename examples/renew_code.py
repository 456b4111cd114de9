# SPDX-License-Identifier: Apache-2.0
"""Gives checkpoints the code of `modeling/` as it is now.

Run: python examples/renew_code.py examples/checkpoints/*
"""

import argparse
from pathlib import Path

from rcc_hf.shipping import renew_code


def main(argv: list[str] | None = None) -> None:
    """Renew, and say what has changed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", help="checkpoints, each a folder")
    for folder in parser.parse_args(argv).folders:
        changed = renew_code(folder)
        print(f"{folder}: {', '.join(changed) or 'nothing changed'}")


if __name__ == "__main__":
    main()
