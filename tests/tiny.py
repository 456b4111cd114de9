# SPDX-License-Identifier: Apache-2.0
"""Tiny models and inputs, made in code."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from rcc_hf import RCCConfig, RCCForCausalLM
from rcc_hf.modeling.fingerprint_rcc import is_trained_part
from rcc_hf.modeling.memory_rcc import WIRINGS
from rcc_hf.modeling.schemes_rcc import SCHEMES, option_names

VOCAB = 128
SEGMENT = 16
RATIO = 4
WINDOW = 32

VARIANTS = {f"rcc-{wiring}": {"scheme": "rcc", "scheme_options": {"wiring": wiring}} for wiring in WIRINGS}
VARIANTS["rcc-spread"] = {"scheme": "rcc", "spread_slots": True}
"""Both forms of memory (keys and values, or states), and slots spread: options of `rcc_model`."""

WRITTEN_VARIANTS = {
    **VARIANTS,
    "rcc-marked": {"scheme": "rcc", "scheme_options": {"mark_slots": True}},
    **{name: {"scheme": name} for name in SCHEMES if name != "rcc"},
}
"""Those too that differ in what is written, not in what becomes of it: all schemes, for tests of schemes."""


def text_config(family: str = "llama", **overrides):
    """Configuration of a base model of `family` with three layers of width 32."""
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if family in ("gemma2", "gemma3_text", "qwen3"):
        values["head_dim"] = 8
    if family.startswith("gemma"):
        values["sliding_window"] = 64
    if family in ("mixtral", "qwen3_moe"):
        values |= {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    if family == "gpt_neox":
        del values["num_key_value_heads"]
    if family == "mistral":
        values["sliding_window"] = None
    return AutoConfig.for_model(family, **values | overrides)


def base_model(family: str = "llama", **overrides) -> PreTrainedModel:
    """A base model with random weights."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(text_config(family, **overrides)).eval()


def rcc_model(
    family: str = "llama", dtype: torch.dtype = torch.float64, attn: str = "sdpa", **options
) -> RCCForCausalLM:
    """An RCC model with random weights whose adapters are far from the identity.

    `options` are fields of `RCCConfig` (`scheme_options={...}` for those of the scheme).
    """
    torch.manual_seed(0)
    ranks = {name: 4 for name in option_names(options.get("scheme", "rcc")) if name.endswith("_rank")}
    small = {**ranks, **options.pop("scheme_options", {})}
    config = RCCConfig(
        text_config=options.pop("text_config", None) or text_config(family),
        **{"segment_length": SEGMENT, "ratio": RATIO, "window": WINDOW, "scheme_options": small, **options},
    )
    model = RCCForCausalLM._from_config(config, attn_implementation=attn).to(dtype).eval()
    move_from_identity(model)
    return model


def skip_if_it_cannot_recompress(model, when_full: str = "recompress") -> None:
    """Skip what needs a memory's slots to be thinned out, of a scheme that cannot."""
    if when_full == "recompress" and not model.model.scheme.nested_ratios:
        pytest.skip("slots of this scheme cannot be thinned out")


@torch.no_grad()
def move_from_identity(model: torch.nn.Module, std: float = 0.1) -> None:
    """Add noise to every trained parameter: fresh adapters are zero, and would hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if is_trained_part(name):
            parameter += (torch.randn(parameter.shape, generator=generator) * std).to(parameter)


def base_with_weights_of(model: RCCForCausalLM) -> PreTrainedModel:
    """The base alone, made by transformers."""
    base = AutoModelForCausalLM.from_config(model.config.text_config).to(model.dtype).eval()
    own = {name.replace("model.language_model.", "model."): p for name, p in model.state_dict().items()}
    base.load_state_dict({name: p for name, p in own.items() if not is_trained_part(name)})
    return base


def tokens(batch_size: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random ids `[B, T]` without special ones."""
    return torch.randint(3, VOCAB, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def pad(rows: list[torch.Tensor], side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    """Rows `[T_i]` as one batch `[B, T]` with padding on the given side, and its mask."""
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


def ratio_of_norms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The error of `actual` relative to `expected`."""
    return ((actual - expected).norm() / expected.norm()).item()


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose words are "w3" to "w127", of the ids that they name."""
    special = {"<pad>": 0, "<s>": 1, "</s>": 2}
    words = Tokenizer(WordLevel(special | {f"w{i}": i for i in range(3, VOCAB)}, unk_token="</s>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


CHAT_TEMPLATE = (
    "{% set names = {'system': 'w3', 'user': 'w4', 'assistant': 'w5'} %}"
    "{% for message in messages %}{{ names[message.role] + ' ' + message.content + ' </s> w6 ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'w5 ' }}{% endif %}"
)
"""As ChatML, in words of `tokenizer`: a role, the message, an end token, and one more that no reply writes."""


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """`tokenizer` with a chat template."""
    made = tokenizer()
    made.chat_template = CHAT_TEMPLATE
    return made


def words(ids: torch.Tensor) -> str:
    """The text of one row of ids `[T]` that `tokenizer` reads back as them."""
    return " ".join(f"w{i}" for i in ids.tolist())
