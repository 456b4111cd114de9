# SPDX-License-Identifier: Apache-2.0
"""The output of a training of a tiny compressor, and a tiny base in the place of the bundled one."""

import json

import torch
from evaluating import byte_tokenizer
from tiny import base_model, move_from_identity

from rcc_hf import RCCForCausalLM

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}<assistant>"


def trained_output(root):
    """Folders of a base and of what `rcc train` leaves."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    base_model(vocab_size=260, max_position_embeddings=2048).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    ranks = {"write_rank": 4, "read_rank": 4, "map_rank": 4}
    model = RCCForCausalLM.from_base(
        root / "base", segment_length=32, ratio=16, window=64, dtype=torch.float32, **ranks
    ).eval()
    move_from_identity(model)
    model.config.reconstruction_prompt_ids = tokenizer("\n\nRepeat the text above:\n")["input_ids"]
    model.config.use_cache = False
    model.save_pretrained(root / "trained", adapter_only=True)
    tokenizer.save_pretrained(root / "trained")
    (root / "trained" / "training_args.bin").write_bytes(b"arguments")
    (root / "trained" / "all_results.json").write_text("{}")
    (root / "trained" / "mixture.json").write_text(json.dumps({"seed": 0, "max_steps": 3100}))
    (root / "trained" / "checkpoint-3100").mkdir()
    return root / "base", root / "trained"
