# SPDX-License-Identifier: Apache-2.0
"""Base checkpoints and RCC checkpoints on them, and what two models must agree in."""

from pathlib import Path

import torch
from safetensors import safe_open
from tiny import RATIO, SEGMENT, WINDOW, base_model, move_from_identity, tokens
from transformers import GenerationConfig

from rcc_hf import RCCForCausalLM

SMALL = {"segment_length": SEGMENT, "ratio": RATIO, "window": WINDOW, "write_rank": 4, "read_rank": 4, "map_rank": 4}
CODE = {path.name for path in (Path(__file__).parent.parent / "modeling").glob("*.py")} - {"__init__.py"}
# a fused projection, a router and experts that transformers itself converts, soft capping and tied embeddings
FAMILIES = ("llama", "gpt_neox", "phi3", "mixtral", "gemma2", "granite")


class Bases:
    """Folders of base checkpoints below `folder`, made when asked for."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, family: str = "llama", name: str | None = None, **overrides) -> Path:
        """The folder of a base; `overrides` are fields of its configuration, `name` is then its own."""
        path = self.folder / (name or family)
        if not path.is_dir():
            model = base_model(family, **overrides)
            model.generation_config = GenerationConfig(
                max_new_tokens=7, top_k=11, do_sample=True, bos_token_id=1, eos_token_id=2, pad_token_id=0
            )
            model.save_pretrained(path)
        return path

    def trained(self, family: str = "llama", base: Path | None = None, **overrides) -> RCCForCausalLM:
        """A model on a base whose compressor is not the one it would start with."""
        model = RCCForCausalLM.from_base(base or self(family), **SMALL | overrides).eval()
        move_from_identity(model)
        return model


@torch.no_grad()
def answers(model) -> torch.Tensor:
    """Logits (of the backbone alone: hidden states) without memory and behind one."""
    memory, ids = model.compress(tokens(2, 54)), tokens(2, 5, seed=1)
    outputs = [model(ids), model(ids, memory=memory)]
    return torch.cat([output.logits if hasattr(output, "logits") else output[0] for output in outputs], 1)


def stored(folder: Path) -> dict[str, torch.Size]:
    """Names and shapes of all weights of a checkpoint."""
    shapes = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}
    return shapes


def assert_generates_alike(one, other) -> None:
    """Behind a memory, and with a prompt that does not fit the window."""
    settings = {"max_new_tokens": 6, "do_sample": False}
    for prompt, context in ((tokens(2, 5), tokens(2, 54)), (tokens(2, 61), None)):
        texts = []
        for model in (one, other):
            memory = {} if context is None else {"memory": model.compress(context)}
            texts.append(model.generate(prompt, **memory, **settings))
        assert torch.equal(*texts)
