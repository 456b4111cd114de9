# SPDX-License-Identifier: Apache-2.0
"""Tables and figures of what run.py measured.

    python benchmarks/speed/report.py OUTPUT.json ... [--output docs/images] [--tables FILE.md]

Several files, of one GPU each, are taken as one. Tables are printed as Markdown; figures (PNG) are written where a
folder is given.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tables import markdown


def merge(files: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The rows of all files as those of one.

    Raises:
        ValueError: they were measured with different setups.
    """
    setup, runs, rows = files[0]["setup"], [], []
    for data in files:
        changed = [name for name in setup if data["setup"].get(name) != setup[name]]
        if changed:
            raise ValueError(f"the files were measured with different {', '.join(changed)}; report them one by one")
        rows += [{**row, "run": row["run"] + len(runs)} for row in data["rows"]]
        runs += data["runs"]
    return {"setup": setup, "runs": runs, "rows": rows}


def main(argv: Sequence[str] | None = None) -> None:
    """Read, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files that run.py wrote")
    parser.add_argument("--output", type=Path, help="folder for figures")
    parser.add_argument("--tables", type=Path, help="file for the tables, which are printed otherwise")
    settings = parser.parse_args(argv)
    data = merge([json.loads(file.read_text(encoding="utf-8")) for file in settings.results])
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
