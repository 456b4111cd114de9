# SPDX-License-Identifier: Apache-2.0
"""`RCCConfig`: a base model's configuration plus how its context is compressed."""

import transformers
from transformers import AutoConfig, PreTrainedConfig

from .schemes_rcc import complete_options

RCC_VERSION = "0.1.0"
MINIMUM_TRANSFORMERS = (5, 16)


def check_transformers(version: str) -> None:
    """Refuse a transformers whose masks would let tokens see the future when memory is in front (below 5.14) or whose
    activation checkpointing drops it (below 5.15).

    Raises:
        ImportError: if `version` is older than we support.
    """
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_TRANSFORMERS:
        needed = ".".join(map(str, MINIMUM_TRANSFORMERS))
        raise ImportError(
            f"RCC needs transformers {needed} or newer, and this is {version}: older versions compute wrong results "
            f"with compressed memory. Run: pip install -U 'transformers>={needed}'"
        )


check_transformers(transformers.__version__)


class RCCConfig(PreTrainedConfig):
    """Configuration of a base language model that reads long contexts through a compressed memory.

    Args:
        text_config: configuration of the base model (or its dictionary), verbatim.
        scheme: name of the memory scheme.
        scheme_options: options of the scheme; missing ones are filled with defaults.
        ratio: source tokens per slot unless a call says otherwise; divides `segment_length`.
        segment_length: tokens that are compressed together, `W`.
        window: `generate` leaves prompts of at most so many tokens alone, and keeps at most so many raw of a longer
            one; at least `segment_length`. Default: 4 segments, but no more than half of the base's range.
        stride: how many tokens the window moves on at a time in a forward call over more than a window: a multiple of
            `segment_length` up to `window`. None, one segment, gives every token the logits that `generate` would; a
            whole window is cheapest.
        head_length: how many tokens at the start of a context stay raw in front of the slots (a system prompt, an
            attention sink) unless a call says otherwise.
        spread_slots: whether slots stand where their text stood, and what follows where it would stand behind that
            text, as far as `slot_positions` reach (longer texts shrink evenly into them); otherwise slots stand at 0,
            1, 2, ... A model is trained for one of both.
        fit_positions: when slots and text need more positions than the base was trained for: whether to spread slots
            evenly over `slot_positions` positions (at fractions) instead of refusing.
        slot_positions: positions that fitted or spread slots have; the rest of the base's range is for local and new
            tokens. Default: half of the range, or with `spread_slots` what a full window and an eighth leave of it, if
            that is less.
        encode_batch_tokens: how many tokens the compressor sees in one forward call. None leaves it to the base's size
            and the device (see `batch_tokens`).
        base_model_name_or_path: where the base's weights came from.
        adapter_only: whether the checkpoint holds the compressor alone, and the base is loaded from elsewhere.
        base_fingerprint: fingerprint of the base's weights that an adapter-only checkpoint was made with.
        reconstruction_prompt_ids: ids of the prompt after which the model was trained to repeat its memory.
        rcc_version: version of rcc_hf that wrote the checkpoint.

    Raises:
        ValueError: if a number is out of range, or the scheme is unknown.
        TypeError: if the scheme has no such option.
    """

    model_type = "rcc"
    sub_configs = {"text_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        text_config=None,
        scheme: str = "rcc",
        scheme_options: dict | None = None,
        ratio: int = 32,
        segment_length: int = 1024,
        window: int | None = None,
        stride: int | None = None,
        head_length: int = 0,
        spread_slots: bool = False,
        fit_positions: bool = False,
        slot_positions: int | None = None,
        encode_batch_tokens: int | None = None,
        base_model_name_or_path: str | None = None,
        adapter_only: bool = False,
        base_fingerprint: str | None = None,
        reconstruction_prompt_ids: list[int] | None = None,
        rcc_version: str = RCC_VERSION,
        tie_word_embeddings: bool | None = None,
        **kwargs,
    ):
        if text_config is None:
            text_config = AutoConfig.for_model("llama")
        elif isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**{"model_type": "llama", **text_config})
        self.text_config = text_config
        self.scheme = scheme
        self.scheme_options = complete_options(scheme, scheme_options)
        self.ratio = ratio
        self.segment_length = segment_length
        self.window = self._default_window() if window is None else window
        self.stride = stride
        self.head_length = head_length
        self.spread_slots = spread_slots
        self.fit_positions = fit_positions
        if slot_positions is None and self.max_positions is not None:
            slot_positions = self._default_slot_positions()
        self.slot_positions = slot_positions
        self.encode_batch_tokens = encode_batch_tokens
        self.base_model_name_or_path = base_model_name_or_path
        self.adapter_only = adapter_only
        self.base_fingerprint = base_fingerprint
        self.reconstruction_prompt_ids = reconstruction_prompt_ids
        self.rcc_version = rcc_version
        self._check_numbers()
        if tie_word_embeddings is None:
            tie_word_embeddings = bool(getattr(text_config, "tie_word_embeddings", False))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "dtype"):
            kwargs.setdefault(name, getattr(text_config, name, None))
        super().__init__(**{"tie_word_embeddings": tie_word_embeddings, **kwargs})

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As the library, which sets overrides behind the constructor's back; they are checked too."""
        loaded = super().from_dict(config_dict, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config.scheme_options = complete_options(config.scheme, config.scheme_options)
        config._check_numbers()
        return loaded

    @property
    def max_positions(self) -> int | None:
        """Positions that the base was trained for; None if its configuration does not say."""
        return getattr(self.text_config, "max_position_embeddings", None)

    def get_text_config(self, decoder=None, encoder=None) -> PreTrainedConfig:
        """The base's configuration, which caches and `generate` ask for."""
        return self.text_config

    def check_ratio(self, ratio: int | None) -> int:
        """The ratio to use: `ratio`, or the configured one for None.

        Raises:
            ValueError: if it does not divide the segment length.
        """
        ratio = self.ratio if ratio is None else ratio
        if not isinstance(ratio, int) or ratio < 1 or self.segment_length % ratio:
            raise ValueError(
                f"ratio={ratio!r} does not divide segment_length={self.segment_length}; "
                f"choose one of {', '.join(map(str, self.possible_ratios()))}"
            )
        return ratio

    def check_window(self, window: int | None) -> None:
        """Refuse a window (None stands for no window) that is shorter than a segment.

        Raises:
            ValueError: if it is.
        """
        if window is not None and (not isinstance(window, int) or window < self.segment_length):
            raise ValueError(
                f"window={window!r} is shorter than segment_length={self.segment_length}: what is left behind "
                "the last whole segment would not fit. Choose a larger window or a shorter segment"
            )

    def batch_tokens(self, device_type: str) -> int:
        """How many tokens the compressor sees in one forward call: `encode_batch_tokens`, or whole segments for None.

        A small base needs many, or an accelerator waits for launches; in a large one many take much memory. So the two
        widest activations of a layer (`intermediate_size`, in bfloat16) get 1 GiB, as long as that makes 16,384 to
        65,536 tokens. A CPU has no launches to wait for, less memory, and caches: 16,384.

        Args:
            device_type: where, as in `torch.device.type`.
        """
        if self.encode_batch_tokens is not None:
            return self.encode_batch_tokens
        tokens = 16384
        if device_type != "cpu":
            tokens = min(max(2**28 // self.text_config.intermediate_size, tokens), 65536)
        return max(1, tokens // self.segment_length) * self.segment_length

    def possible_ratios(self) -> list[int]:
        """All ratios that divide the segment length, ascending."""
        return [r for r in range(1, self.segment_length + 1) if self.segment_length % r == 0]

    def _default_window(self) -> int:
        half = self.max_positions // 2 if self.max_positions else 4 * self.segment_length
        return max(self.segment_length, min(4 * self.segment_length, half))

    def _default_slot_positions(self) -> int:
        half = self.max_positions // 2
        if not self.spread_slots:
            return half
        # spread slots of a long text take all of it, and a full window and new tokens have to find room beside
        return max(1, min(half, self.max_positions - self.window - max(self.segment_length, self.max_positions // 8)))

    def _check_numbers(self) -> None:
        if self.max_positions and not 1 <= self.slot_positions < self.max_positions:
            raise ValueError(
                f"slot_positions={self.slot_positions} leaves nothing for text, or nothing for slots: choose a number "
                f"from 1 to {self.max_positions - 1}"
            )
        batch_tokens = self.segment_length if self.encode_batch_tokens is None else self.encode_batch_tokens
        for name, number in (("segment_length", self.segment_length), ("encode_batch_tokens", batch_tokens)):
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"{name}={number!r} must be a whole number of at least 1")
        if self.max_positions and self.segment_length > self.max_positions:
            raise ValueError(
                f"segment_length={self.segment_length} is longer than the base's range of {self.max_positions} "
                "positions; choose a shorter segment"
            )
        if not isinstance(self.head_length, int) or self.head_length < 0:
            raise ValueError(f"head_length={self.head_length!r} must be a whole number of at least 0")
        self.check_window(self.window)
        stride = self.segment_length if self.stride is None else self.stride
        if not isinstance(stride, int) or stride % self.segment_length or not 0 < stride <= self.window:
            raise ValueError(
                f"stride={self.stride!r} must be a multiple of segment_length={self.segment_length} up to "
                f"window={self.window}"
            )
        self.check_ratio(self.ratio)
