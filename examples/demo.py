# SPDX-License-Identifier: Apache-2.0
"""A trained compressor on a real Llama: a pass key found in a long novel, a passage read back, questions answered, all
from compressed memory and on a CPU in minutes.

Run: make demo, or python examples/demo.py --help
"""

import argparse
import logging
import tempfile
import textwrap
import time
from collections import Counter
from pathlib import Path

import torch
from demo_printing import print_memory, print_table, section
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers import logging as transformers_logging

from rcc_hf import RCCForCausalLM, RCCMemory
from rcc_hf.checkpoints import ensure_reconstruction_prompt, load_model, load_tokenizer
from rcc_hf.cli.loading import compress_with_progress, encode
from rcc_hf.evaluation.benchmark_qa import questions
from rcc_hf.evaluation.encoding import TextEncoder
from rcc_hf.evaluation.examples import Example
from rcc_hf.evaluation.fillers import TextFiller
from rcc_hf.evaluation.metrics_text import bleu
from rcc_hf.evaluation.needles import NeedleTask, needle_grid
from rcc_hf.modeling.fingerprint_rcc import is_trained_part
from rcc_hf.objectives.reconstruction import pad_segment
from rcc_hf.prose import load_prose
from rcc_hf.smollm import resolve_base

HERE = Path(__file__).parent
CHECKPOINT = HERE / "checkpoints" / "smollm2-135m-rcc"
ARTICLE = HERE / "demo_article.txt"
QUESTIONS = (
    ("Who built the first lighthouse?", "Winstanley"),
    ("Of what material was the first lighthouse made?", "wood"),
    ("In which year did the second lighthouse burn?", "1755"),
    ("From what tree did Smeaton take the shape of his tower?", "oak"),
    ("Where was the upper part of Smeaton's tower put up again?", "Plymouth Hoe"),
)


def main(argv: list[str] | None = None) -> None:
    """Compress, ask, read back, save, go on; or the demo without a checkpoint."""
    args = parse_arguments(argv)
    if not (args.checkpoint / "config.json").exists():
        print(f"There is no trained checkpoint in {args.checkpoint}: instead, a fresh compressor learns for minutes.")
        import demo_fresh

        demo_fresh.main([])
        return
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.captureWarnings(True)
    began = time.perf_counter()

    section("1. A trained compressor, and the base that it was trained on")
    model, tokenizer = load(args.checkpoint, args.base)
    book = load_prose("held_out")[0]
    section(f"2. A pass key is hidden in the middle of {book.title}, which it has not been trained on")
    memory, example = find_pass_key(model, tokenizer, book.text, args)
    section(f"3. A passage of {args.passage or model.config.segment_length} tokens is read back from its slots")
    read_back(model, tokenizer, book.text, args)
    article = ARTICLE.read_text(encoding="utf-8").strip()
    section(f"4. Questions about an article ({ARTICLE.name}, {len(article.split())} words)")
    answer_questions(model, tokenizer, article, args)
    section("5. The memory of the novel is saved, loaded, and goes on")
    go_on(model, tokenizer, memory, example, article)
    print(f"\nDone in {time.perf_counter() - began:.0f} s.")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=" ".join(__doc__.split("\n\n")[0].split()), formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="folder of a trained compressor")
    parser.add_argument("--base", default="smollm2", help="its base: id or folder, or smollm2 for the bundled one")
    parser.add_argument("--tokens", type=int, default=8192, help="length of the long text, pass key included")
    parser.add_argument("--ratio", type=int, default=32, help="tokens per slot of the long text")
    parser.add_argument("--depth", type=float, default=0.5, help="where in it the pass key is: 0 beginning, 1 end")
    parser.add_argument("--ratios", type=int, nargs="+", default=[8, 32], help="tokens per slot of short texts")
    parser.add_argument("--passage", type=int, default=None, help="tokens that are read back (default: a segment)")
    return parser.parse_args(argv)


@torch.no_grad()
def load(checkpoint: Path, base: str) -> tuple[RCCForCausalLM, PreTrainedTokenizerBase]:
    """The model in float32 and its tokenizer; with nothing compressed it has to compute what its base computes."""
    model = load_model(str(checkpoint), base=base, dtype="float32").eval()
    tokenizer = load_tokenizer(model, str(checkpoint), base)
    ensure_reconstruction_prompt(model, tokenizer)
    model.config.encode_batch_tokens = 2048  # so that progress is seen
    plain = AutoModelForCausalLM.from_pretrained(resolve_base(base), dtype=torch.float32).eval()
    ids = encode(tokenizer, "The lighthouse keeper counted the ships", model.device)
    is_equal = torch.equal(model(ids).logits, plain(ids).logits)
    trained = sum(p.numel() for name, p in model.named_parameters() if is_trained_part(name))
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    print_table(
        ("parameters", f"{model.num_parameters() / 1e6:.1f} M, {trained / 1e6:.1f} M of them the compressor's"),
        ("weights of the checkpoint", f"{size:,} bytes"),
        ("nothing compressed", f"the base's logits, {'bit for bit' if is_equal else 'BUT NOT bit for bit'}"),
    )
    return model, tokenizer


def find_pass_key(
    model: RCCForCausalLM, tokenizer: PreTrainedTokenizerBase, text: str, args: argparse.Namespace
) -> tuple[RCCMemory, Example]:
    """Compress a long text with a pass key in it, and ask for it, as `rcc evaluate --task passkey` does."""
    task = NeedleTask(filler=TextFiller(text.split("\n\n"), "novel"))
    (example,) = needle_grid(task, tokenizer, lengths=[args.tokens], depths=[args.depth], seed=0)
    context, _ = TextEncoder(tokenizer)(example)
    start = time.perf_counter()
    memory = compress_with_progress(model, fill_segments(model, tokenizer, context), ratio=args.ratio)
    print_memory(model, memory, args.ratio, len(context), time.perf_counter() - start)
    report_answers(model, tokenizer, example, {"from memory": memory, "without the text": None})
    return memory, example


def read_back(model: RCCForCausalLM, tokenizer: PreTrainedTokenizerBase, text: str, args: argparse.Namespace) -> None:
    """Write one segment from the middle of the text down again, at several ratios."""
    paragraph = text.index("\n\n", len(text) // 2) + 2
    ids = encode(tokenizer, text[paragraph:], model.device)[:, : model.config.segment_length]
    prompt = torch.tensor([model.config.reconstruction_prompt_ids])
    length = min(args.passage or ids.shape[1], ids.shape[1])
    meant = tokenizer.decode(ids[0, :length])
    print_table(("the passage begins", shorten(meant)))
    for ratio in args.ratios:
        start = time.perf_counter()
        memory = model.compress(ids, ratio=ratio)
        made = model.generate(prompt, memory=memory, max_new_tokens=length, do_sample=False)
        written = tokenizer.decode(made[0, prompt.shape[1] :], skip_special_tokens=True)
        score = bleu([written], [meant], num_resamples=0).values["bleu4"]
        seconds = time.perf_counter() - start
        print_table(
            (f"from {memory.num_slots} slots ({ratio}x)", shorten(written)),
            ("BLEU-4", f"{score:.3f} of {length} tokens, greedily, in {seconds:.0f} s"),
        )


def answer_questions(
    model: RCCForCausalLM, tokenizer: PreTrainedTokenizerBase, article: str, args: argparse.Namespace
) -> None:
    """Ask about an article that is compressed alone."""
    ids = encode(tokenizer, article, model.device)[0]
    filled = fill_segments(model, tokenizer, ids)
    memories = {f"from {ratio}x": model.compress(filled, ratio=ratio) for ratio in args.ratios}
    sizes = [f"{memory.num_slots} slots, {memory.nbytes:,} bytes {name}" for name, memory in memories.items()]
    print_table(("the article", f"{len(ids)} tokens: {'; '.join(sizes)}"))
    right: Counter[str] = Counter()
    for question, answer in QUESTIONS:
        row = {"context": "", "question": question, "answer": answer}
        (example,) = questions(row, "demo")
        print_table(("", ""), ("question", question))
        answers = report_answers(model, tokenizer, example, {**memories, "without the article": None}, chat=True)
        right.update({name: answer.lower() in made.lower() for name, made in answers.items()})
    print()
    print_table(*((f"right {name}", f"{count} of {len(QUESTIONS)}") for name, count in right.items()))


def go_on(
    model: RCCForCausalLM, tokenizer: PreTrainedTokenizerBase, memory: RCCMemory, example: Example, more: str
) -> None:
    """Save a memory, load it, append to it, and ask again what it held before."""
    with tempfile.TemporaryDirectory() as folder:
        memory.save_pretrained(folder)
        on_disk = sum(file.stat().st_size for file in Path(folder).iterdir())
        loaded = RCCMemory.from_pretrained(folder)
    added = encode(tokenizer, more, model.device)[0]
    longer = model.compress(fill_segments(model, tokenizer, added), memory=loaded)
    print_table(
        ("saved", f"{on_disk:,} bytes"),
        ("appended", f"the article: {loaded.num_tokens:,} tokens, then {longer.num_tokens:,}"),
        ("slots", f"{loaded.num_slots:,}, then {longer.num_slots:,}"),
    )
    report_answers(
        model, tokenizer, example, {"loaded": loaded, "and appended to": longer, "in 8 bits": longer.to_int8()}
    )


def fill_segments(model: RCCForCausalLM, tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> torch.Tensor:
    """Ids `[1, S * W]` of a text `[T]`, whose last segment is filled up as in training: nothing of it stays raw."""
    return torch.from_numpy(pad_segment(ids.numpy(), model.config.segment_length, tokenizer.eos_token_id))[None]


def report_answers(
    model: RCCForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    memories: dict[str, RCCMemory | None],
    *,
    chat: bool = False,
) -> dict[str, str]:
    """Print what is answered greedily from each memory, beside the right answer; these answers."""
    _, prompt = TextEncoder(tokenizer, chat=chat)(example)
    answers = {}
    for name, memory in memories.items():
        made = model.generate(prompt[None], memory=memory, max_new_tokens=example.max_new_tokens, do_sample=False)
        answers[name] = shorten(tokenizer.decode(made[0, len(prompt) :], skip_special_tokens=True))
    print_table(("right answer", example.answers[0]), *answers.items())
    return answers


def shorten(text: str, width: int = 300) -> str:
    """A text on one line, and not too long."""
    return textwrap.shorten(text, width, placeholder=" ...")


if __name__ == "__main__":
    main()
