# SPDX-License-Identifier: Apache-2.0
"""What a shipped checkpoint answers, recorded beside the tests: a later change of it is meant, or a mistake.

`python tests/shipped.py [NAME ...]` (or `make golden`) records the checkpoints in examples/checkpoints/ anew; look at
what has changed in tests/golden/, and write it down under Numerics in CHANGELOG.md.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rcc_hf import RCCForCausalLM
from rcc_hf.checkpoints import load_model
from rcc_hf.evaluation.metrics_text import bleu
from rcc_hf.prose import load_prose
from rcc_hf.smollm import resolve_base

FOLDER = Path(__file__).parents[1] / "examples" / "checkpoints"
GOLDEN = Path(__file__).parent / "golden"
CHECKPOINTS = sorted(file.parent for file in FOLDER.glob("*/config.json"))
BASE = "smollm2"
PROMPTS = ("\nWho is this text about?", "\nIn one sentence, the text says that")
BARE_PROMPT = "The lighthouse keeper counted"
# Ids are compared up to here, and a passage is read back up to there: a minute has to do.
SHORT, LONG = 24, 128
# Logits in float32 on another machine, of another build of torch; and what a passage may lose by near ties.
TOLERANCE, SLACK = 2e-3, 0.05


def passages() -> list[str]:
    """Three places of books that no training has seen, each longer than any segment."""
    text = load_prose("held_out")[0].text
    return [text[start : start + 8000] for start in (20_000, 60_000, 100_000)]


@torch.no_grad()
def measure(folder: Path, base: str | Path, texts: list[str]) -> dict[str, Any]:
    """What a checkpoint reads back of the first segment of each text, and says behind the first of them and alone."""
    model = load_model(str(folder), base=str(base), dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(resolve_base(str(base)))
    contexts = torch.stack([encode(tokenizer, text)[: model.config.segment_length] for text in texts])
    memory = model.compress(contexts)
    prompt = torch.tensor([model.config.reconstruction_prompt_ids]).repeat(len(texts), 1)
    length = min(contexts.shape[1], LONG)
    read = generate(model, prompt, length, memory=memory)
    first = model.compress(contexts[:1])
    top = model(prompt[:1], memory=first).logits[0, -1].topk(8)
    written, meant = (tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (read, contexts[:, :length]))
    answers = {text: generate(model, encode(tokenizer, text)[None], SHORT, memory=first)[0] for text in PROMPTS}
    answers[BARE_PROMPT] = generate(model, encode(tokenizer, BARE_PROMPT)[None], SHORT)[0]
    return {
        "reads": [ids[:SHORT] for ids in read],
        "answers": answers,
        "texts": {name: tokenizer.decode(ids) for name, ids in answers.items()},
        "top ids": top.indices.tolist(),
        "top logits": [round(value, 4) for value in top.values.tolist()],
        "bleu4": round(bleu(written, meant, num_resamples=0).values["bleu4"], 4),
    }


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """Ids `[T]`."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def generate(model: RCCForCausalLM, prompt: torch.Tensor, length: int, **options: Any) -> list[list[int]]:
    """New ids of each row, greedily, all of one length: an end of text ends nothing."""
    settings = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False, "repetition_penalty": 1.0}
    made = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings, **options)
    return made[:, prompt.shape[1] :].tolist()


def differences(recorded: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What is not as it was recorded, in words; nothing, if all is."""
    changed = []
    for name in ("reads", "answers", "top ids"):
        if found[name] != recorded[name]:
            changed.append(f"{name}: {found[name]}, recorded {recorded[name]}")
    errors = [abs(a - b) for a, b in zip(found["top logits"], recorded["top logits"], strict=True)]
    if max(errors) > TOLERANCE:
        changed.append(f"top logits differ by {max(errors):.2g}: {found['top logits']}")
    if found["bleu4"] < recorded["bleu4 at least"]:
        changed.append(f"bleu4 is {found['bleu4']}, at least {recorded['bleu4 at least']} is asked for")
    return changed


def record(folder: Path, base: str | Path, texts: list[str], file: Path) -> None:
    """Write the golden file of a checkpoint; it holds the texts."""
    found = measure(folder, base, texts)
    content = {"passages": texts, **found, "bleu4 at least": round(max(0.0, found["bleu4"] - SLACK), 4)}
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def check(folder: Path, base: str | Path, file: Path) -> list[str]:
    """The differences of a checkpoint to its golden file."""
    recorded = json.loads(file.read_text(encoding="utf-8"))
    return differences(recorded, measure(folder, base, recorded["passages"]))


def main() -> None:
    """Record all checkpoints, or those named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="folders in examples/checkpoints/ (default: all)")
    names = parser.parse_args().names or [folder.name for folder in CHECKPOINTS]
    for name in names:
        record(FOLDER / name, BASE, passages(), GOLDEN / f"{name}.json")
        sys.stdout.write(f"wrote {GOLDEN / name}.json\n")


if __name__ == "__main__":
    main()
