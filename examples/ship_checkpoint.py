# SPDX-License-Identifier: Apache-2.0
"""Packs the output of a training into a folder that others can use, with a model card.

Run: python examples/ship_checkpoint.py runs/rcc examples/checkpoints/NAME --facts examples/cards/NAME.yaml \
--results runs/results
"""

import argparse
import json
from pathlib import Path

from rcc_hf.shipping import MOST_BYTES, model_card, pack, read_facts, result_tables
from rcc_hf.shipping.facts import check_steps


def main(argv: list[str] | None = None) -> None:
    """Write the card, pack, and say what was written."""
    args = parse_arguments(argv)
    facts = read_facts(args.facts)
    check_steps(facts, args.source)
    config = json.loads((args.source / "config.json").read_text(encoding="utf-8"))
    card = model_card(
        facts,
        config,
        folder=args.name or args.output.as_posix(),
        base=args.base,
        size=sum(file.stat().st_size for file in args.source.glob("*.safetensors")),
        tables=result_tables(args.results) if args.results else "",
    )
    pack(args.source, args.output, base=args.base, card=card, most_bytes=args.most_bytes)
    for file in sorted(args.output.iterdir()):
        print(f"{file.stat().st_size:>12,}  {file}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("source", type=Path, help="what rcc train wrote: an adapter-only checkpoint")
    parser.add_argument("output", type=Path, help="folder to make")
    parser.add_argument("--facts", type=Path, required=True, help="YAML with what the card says about the training")
    parser.add_argument("--results", type=Path, nargs="*", default=[], help="metrics.json files, or folders of them")
    parser.add_argument("--base", default="smollm2", help="by which users find the base: id on the Hub, or smollm2")
    parser.add_argument("--name", default=None, help="id or folder in the card's commands (default: the output)")
    parser.add_argument("--most_bytes", type=int, default=MOST_BYTES, help="limit of the weights")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
