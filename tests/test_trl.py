# SPDX-License-Identifier: Apache-2.0
"""TRL's SFTTrainer on texts longer than the window: what it trains on is what a plain forward call gives."""

import pytest
import torch
from tiny import WINDOW, rcc_model, tokenizer, tokens
from torch.nn.functional import cross_entropy

pytest.importorskip("trl")

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

LENGTHS = (75, 40, 20, 90)
WAYS = {
    "padded": {"max_length": 128},
    "packed": {"max_length": 128, "packing": True},
    "padding-free": {"max_length": None, "padding_free": True},
}

pytestmark = [
    # TRL of 1.16 on attention kernels that it would rather have
    pytest.mark.filterwarnings("ignore:.*(packing|padding-free|attention implementation)"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def rows() -> list[torch.Tensor]:
    return [tokens(1, n, seed=n) for n in LENGTHS]


@torch.no_grad()
def expected_loss(model) -> float:
    """The mean over the tokens of all documents, each on its own."""
    losses = [cross_entropy(model(row).logits[0, :-1], row[0, 1:], reduction="sum") for row in rows()]
    return (torch.stack(losses).sum() / sum(n - 1 for n in LENGTHS)).item()


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_sft_trains_the_compressor_on_long_texts(way, tmp_path):
    model = rcc_model(dtype=torch.float32)
    model.freeze_base()
    before, expected = {n: p.detach().clone() for n, p in model.named_parameters()}, expected_loss(model)
    assert max(LENGTHS) > 2 * WINDOW
    settings = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **way,
    )
    data = Dataset.from_list([{"input_ids": row[0].tolist()} for row in rows()])
    trainer = SFTTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer())
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if ".rcc." in n}
