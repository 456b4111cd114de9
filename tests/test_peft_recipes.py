# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning as the documentation and the example do it, on tiny checkpoints."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import RATIO, SEGMENT, WINDOW, base_model, move_from_identity, ratio_of_norms, tokenizer, tokens

from rcc_hf import RCCForCausalLM
from rcc_hf.cli import main
from rcc_hf.modeling.fingerprint_rcc import is_trained_part

peft = pytest.importorskip("peft")

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs" / "finetuning.md").read_text()


@pytest.fixture
def checkpoints(tmp_path):
    """The folder that the document speaks of."""
    folder = tmp_path / "checkpoints"
    base_model(hidden_size=64, intermediate_size=128).save_pretrained(folder / "base")
    options = {"segment_length": SEGMENT, "ratio": RATIO, "window": WINDOW, "write_rank": 4, "read_rank": 4}
    model = RCCForCausalLM.from_base(folder / "base", **options)
    move_from_identity(model)
    model.save_pretrained(folder / "rcc")
    for name in ("base", "rcc"):
        tokenizer().save_pretrained(folder / name)
    return folder


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)


def test_the_document_runs_from_top_to_bottom(checkpoints, monkeypatch):
    monkeypatch.chdir(checkpoints.parent)
    names: dict = {}
    for block in blocks("python"):
        if "needs bitsandbytes" not in block or importlib.util.find_spec("bitsandbytes"):
            exec(compile(block, "finetuning.md", "exec"), names)  # our own text
    assert torch.equal(names["same"], names["output"])
    started, given = names["model"], RCCForCausalLM.from_pretrained("checkpoints/rcc")
    maps = [m.model.language_model.layers[1].mlp.up_proj.weight for m in (names["merged"], given)]
    assert ratio_of_norms(*maps) > 1e-3
    read = [m.model.language_model.layers[1].rcc.read["mlp_up_proj_adapter"] for m in (started, given)]
    assert torch.equal(read[0].down[:4], read[1].down)
    for line in blocks("console")[0].splitlines():
        assert main(shlex.split(line)[1:]) == 0
    assert (checkpoints.parent / "runs" / "write-lora" / "adapter_config.json").exists()
    again = RCCForCausalLM.from_pretrained("runs/started")
    assert torch.equal(again.model.language_model.layers[1].rcc.read["mlp_up_proj_adapter"].down[:4], read[1].down)


@pytest.mark.parametrize("flags", [[], ["--train-compressor"]], ids=["lora", "lora and compressor"])
def test_the_example_keeps_its_outputs_at_every_step(flags, tmp_path):
    command = [sys.executable, ROOT / "examples" / "finetune_with_peft.py", "--tiny", "--steps", "12", *flags]
    done = subprocess.run([*command, "--output", tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    losses = [float(loss) for loss in re.findall(r"'loss': '([\d.]+)'", done.stdout)]
    assert losses[-1] < losses[0]
    found = dict(re.findall(r"(?m)^(.+): logits differ by (\S+)$", done.stdout))
    assert float(found["the adapter on a fresh model"]) == 0
    assert float(found["merged into the base"]) <= 1e-5
    assert float(found["merged, saved and loaded"]) == 0
    assert "expected: 'Rome <eos>'" in done.stdout
    before, after = (RCCForCausalLM.from_pretrained(tmp_path / name) for name in ("tiny/checkpoint", "merged"))
    new = dict(after.named_parameters())
    changed = {is_trained_part(name) for name, p in before.named_parameters() if not torch.equal(p, new[name])}
    assert changed == ({False, True} if flags else {False})


@pytest.mark.filterwarnings("ignore:.*(packing|padding-free|attention implementation)")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_sft_with_a_lora_on_long_texts(checkpoints, tmp_path):
    """TRL puts the LoRA on by itself; what it saves gives the same logits on a fresh model, and merged."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rows = [tokens(1, length, seed=length)[0] for length in (75, 40, 90)]
    assert max(map(len, rows)) > 2 * WINDOW
    settings = trl.SFTConfig(
        output_dir=str(tmp_path / "run"), max_steps=3, per_device_train_batch_size=3, learning_rate=1e-2, use_cpu=True,
        logging_steps=1, bf16=False, report_to=[], disable_tqdm=True, max_length=128, save_strategy="no",
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=RCCForCausalLM.from_pretrained(checkpoints / "rcc"),
        args=settings,
        train_dataset=datasets.Dataset.from_list([{"input_ids": row.tolist()} for row in rows]),
        processing_class=tokenizer(),
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    trainer.save_model(tmp_path / "adapter")

    def logits(model):
        with torch.no_grad():
            return model.eval()(rows[2][None]).logits

    expected = logits(trainer.model)
    fresh = RCCForCausalLM.from_pretrained(checkpoints / "rcc")
    assert ratio_of_norms(logits(fresh), expected) > 1e-3
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert torch.equal(logits(again), expected)
    assert ratio_of_norms(logits(again.merge_and_unload()), expected) <= 1e-5
