# SPDX-License-Identifier: Apache-2.0
"""Teach an RCC checkpoint a task with PEFT: train a LoRA, save it, load it, merge it, save and load the merged model.

Run: python examples/finetune_with_peft.py CHECKPOINT --data questions.jsonl --output runs/task
     python examples/finetune_with_peft.py --tiny --output runs/tiny
"""

import argparse
import json
import logging
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed

from rcc_hf import RCCForCausalLM
from rcc_hf.checkpoints import load_model, load_tokenizer


def main() -> None:
    args = parse_arguments()
    logging.captureWarnings(True)
    set_seed(0)
    output = Path(args.output)
    checkpoint, data = make_tiny(output / "tiny") if args.tiny else (args.checkpoint, args.data)
    model = load_model(checkpoint)
    tokenizer = load_tokenizer(model, checkpoint)
    lines = Path(data).read_text(encoding="utf-8").rstrip("\n").split("\n")  # other line ends may stand in texts
    rows = [encode(tokenizer, json.loads(line)) for line in lines]
    shortest = min(len(row["context_ids"]) for row in rows)
    if shortest < model.config.segment_length:
        raise SystemExit(
            f"a context has {shortest} tokens and a segment {model.config.segment_length}: nothing would be compressed "
            "of it. Give longer contexts, or fill them up with the end-of-text token"
        )

    # The LoRA is on in both passes: it changes how the context is compressed and how the memory is read.
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        lora_alpha=16,
        target_modules="all-linear",  # linear maps of the base; the compressor has none
        modules_to_save=["rcc"] if args.train_compressor else None,  # all that is the compressor's is named so
    )
    model = get_peft_model(model, settings)
    model.print_trainable_parameters()
    train(model, rows, args)

    batch = {name: tensor.to(model.device) for name, tensor in collate(rows[: args.batch_size]).items()}
    model.save_pretrained(output / "adapter")
    trained = logits(model, batch)
    again = PeftModel.from_pretrained(load_model(checkpoint).to(model.device), output / "adapter")
    report("the adapter on a fresh model", logits(again, batch), trained)
    merged = again.merge_and_unload()
    report("merged into the base", logits(merged, batch), trained)
    merged.save_pretrained(output / "merged")
    tokenizer.save_pretrained(output / "merged")
    final = RCCForCausalLM.from_pretrained(output / "merged").to(model.device).eval()
    report("merged, saved and loaded", logits(final, batch), logits(merged, batch))
    show_answer(final, tokenizer, rows[0])


def train(model: PeftModel, rows: list[dict[str, torch.Tensor]], args: argparse.Namespace) -> None:
    settings = TrainingArguments(
        output_dir=str(Path(args.output) / "trainer"),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        logging_steps=max(1, args.steps // 10),
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
    )
    Trainer(model=model, args=settings, train_dataset=rows, data_collator=collate).train()


def encode(tokenizer, row: dict[str, str]) -> dict[str, torch.Tensor]:
    """A context to compress, and behind it a question and its answer, of which only the answer is predicted."""
    context, question, answer = (
        torch.tensor(tokenizer(row[name], add_special_tokens=False)["input_ids"])
        for name in ("context", "question", "answer")
    )
    answer = torch.cat([answer, torch.tensor([tokenizer.eos_token_id])])
    labels = torch.cat([torch.full_like(question, -100), answer])
    return {"context_ids": context, "input_ids": torch.cat([question, answer]), "labels": labels}


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows of several lengths, padded; masks say where."""
    batch = {
        name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=-100 if name == "labels" else 0)
        for name in rows[0]
    }
    for ids, mask in (("context_ids", "context_mask"), ("input_ids", "attention_mask")):
        batch[mask] = pad_sequence([torch.ones_like(row[ids]) for row in rows], batch_first=True)
    return batch


@torch.no_grad()
def logits(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    model.eval()
    return model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits


def report(what: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    print(f"{what}: logits differ by {(actual - expected).norm() / expected.norm():.1e}")


def show_answer(model: RCCForCausalLM, tokenizer, row: dict[str, torch.Tensor]) -> None:
    memory = model.compress(row["context_ids"][None].to(model.device))
    question = row["input_ids"][row["labels"] == -100][None].to(model.device)
    ids = model.generate(question, memory=memory, max_new_tokens=8, do_sample=False)[0, question.shape[1] :]
    expected = row["labels"][row["labels"] != -100]
    print(f"answer: {tokenizer.decode(ids)!r}, expected: {tokenizer.decode(expected)!r}")


def make_tiny(folder: Path) -> tuple[Path, Path]:
    """A checkpoint of a random base with a fresh compressor, and questions about who is where."""
    names, places = ("Ann", "Ben", "Cem", "Dee", "Eva", "Finn"), ("Rome", "Oslo", "Lima", "Bern")
    words = ["<pad>", "<eos>", "is", "in", ".", "Where", "?", *names, *places]
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(words), max_position_embeddings=256, bos_token_id=None, eos_token_id=1, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    model = RCCForCausalLM.from_base(folder / "base", segment_length=15, ratio=5, window=60, write_rank=8, read_rank=8)
    model.save_pretrained(folder / "checkpoint")
    tokenizer.save_pretrained(folder / "checkpoint")
    rows = []
    for number in range(48):
        facts = [(name, places[(number * 7 + i * (1 + number % 3)) % len(places)]) for i, name in enumerate(names)]
        asked, place = facts[number % len(facts)]
        context = " ".join(f"{name} is in {where} ." for name, where in facts)
        rows.append({"context": context, "question": f"Where is {asked} ?", "answer": place})
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "checkpoint", folder / "questions.jsonl"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("checkpoint", nargs="?", help="RCC checkpoint, or smollm2 for a fresh compressor on it")
    parser.add_argument("--data", help='JSON lines of {"context": ..., "question": ..., "answer": ...}')
    parser.add_argument("--output", required=True, help="folder for the adapter and the merged model")
    parser.add_argument("--train-compressor", action="store_true", help="train the compressor along with the LoRA")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=8, help="rows per step")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--tiny", action="store_true", help="a made-up model and task, in seconds on a CPU")
    args = parser.parse_args()
    if not args.tiny and (args.checkpoint is None or args.data is None):
        parser.error("give a checkpoint and --data, or --tiny")
    return args


if __name__ == "__main__":
    main()
