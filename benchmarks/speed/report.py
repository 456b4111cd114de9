# SPDX-License-Identifier: Apache-2.0
"""Tables and figures of what run.py measured.

    python benchmarks/speed/report.py OUTPUT.json [--output docs/images] [--tables FILE.md]

Tables are printed as Markdown; figures (PNG) are written where a folder is given.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tables import markdown


def main(argv: Sequence[str] | None = None) -> None:
    """Read, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON file that run.py wrote")
    parser.add_argument("--output", type=Path, help="folder for figures")
    parser.add_argument("--tables", type=Path, help="file for the tables, which are printed otherwise")
    settings = parser.parse_args(argv)
    data = json.loads(settings.results.read_text(encoding="utf-8"))
    text = markdown(data)
    if settings.tables is None:
        sys.stdout.write(text)
    else:
        settings.tables.write_text(text, encoding="utf-8")
    if settings.output is not None:
        from figures import draw  # tables do without matplotlib

        from rcc_hf.plotting.figures import save

        for file in save(draw(data), settings.output, ["png"]):
            sys.stdout.write(f"wrote {file}\n")


if __name__ == "__main__":
    main()
