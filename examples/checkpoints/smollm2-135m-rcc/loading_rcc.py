# SPDX-License-Identifier: Apache-2.0
"""From base models and checkpoints to RCC models, and back to disk: full, or the compressor alone."""

import contextlib
import inspect
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging

from .configuration_rcc import RCC_VERSION, RCCConfig
from .families_rcc import family_of
from .fingerprint_rcc import fingerprint_base, is_trained_part
from .quantised_rcc import adopt_quantisation, quantisation_set_aside
from .schemes_rcc import option_names

logger = logging.get_logger(__name__)

AUTO_MAP = {
    "AutoConfig": "configuration_rcc.RCCConfig",
    "AutoModel": "modeling_rcc.RCCModel",
    "AutoModelForCausalLM": "modeling_rcc.RCCForCausalLM",
}

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
LOADING_ARGUMENTS = (
    *HUB_ARGUMENTS,
    *("attn_implementation", "device_map", "disable_mmap", "dtype", "experts_implementation", "max_memory"),
    *("offload_buffers", "offload_folder", "quantization_config", "torch_dtype", "trust_remote_code"),
    *("use_safetensors", "variant", "weights_only"),
)
_NOT_ARGUMENTS = {
    *("self", "kwargs", "text_config", "scheme_options", "base_model_name_or_path"),
    *("adapter_only", "base_fingerprint", "rcc_version"),
}
CONFIG_ARGUMENTS = tuple(n for n in inspect.signature(RCCConfig.__init__).parameters if n not in _NOT_ARGUMENTS)


class LoadableModel(PreTrainedModel):
    """`from_base`, `from_pretrained` and `save_pretrained` of the RCC models."""

    config_class = RCCConfig
    config: RCCConfig
    _decoder_prefix = ""  # where the base's backbone sits below this class

    @classmethod
    def from_base(cls, base: str | os.PathLike, *, scheme: str = "rcc", **kwargs):
        """Put a fresh compressor on a base checkpoint. Un-compressed, the result computes what the base does.

        Args:
            base: id on the Hub, or a folder.
            scheme: name of the memory scheme.
            kwargs: fields of `RCCConfig` (`ratio`, `segment_length`, `window`, ...), options of the scheme (`wiring`,
                `write_rank`, ...), and arguments of `from_pretrained` (`dtype`, `device_map`, ...).

        Raises:
            TypeError: if an argument is none of these.
            ValueError: if the base's type is not known, or the folder holds no checkpoint.
        """
        options, fields, loading = _sort_arguments(scheme, kwargs)
        hub = {name: loading[name] for name in HUB_ARGUMENTS if name in loading}
        _check_folder(base)
        text_config = AutoConfig.from_pretrained(base, **hub, trust_remote_code=loading.get("trust_remote_code"))
        if text_config.model_type == RCCConfig.model_type:
            raise ValueError(f"{base} is an RCC checkpoint already; load it with {cls.__name__}.from_pretrained")
        family_of(text_config)
        config = RCCConfig(
            text_config=text_config,
            scheme=scheme,
            scheme_options=options,
            base_model_name_or_path=os.fspath(base),
            **fields,
        )
        return cls._load_base(base, config, **loading)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, base_model=None, **kwargs):
        """Load an RCC checkpoint, full or adapter-only; arguments as for any model of transformers.

        Args:
            base_model: where an adapter-only checkpoint finds its base, instead of the place its configuration names.

        Raises:
            ValueError: if the folder holds no RCC checkpoint, or an adapter-only one does not fit its base.
        """
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        if not isinstance(config, PreTrainedConfig):
            source = pretrained_model_name_or_path if config is None else config
            config, kwargs = cls._read_config(source, hub, kwargs)
        if not getattr(config, "adapter_only", False):
            if base_model is not None:
                raise ValueError(f"{pretrained_model_name_or_path} is a full checkpoint: base_model has no use here")
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        variant, base = kwargs.pop("variant", None), base_model or config.base_model_name_or_path
        if base is None:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds the compressor alone and does not say where its base is; "
                "pass base_model='<id or folder>'"
            )
        for name in ("revision", "subfolder"):  # these speak of the compressor's repository
            kwargs.pop(name, None)
        _check_folder(base)
        adopt_quantisation(config, base, {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs})
        model = cls._load_base(base, config, **kwargs)
        loaded = model[0] if isinstance(model, tuple) else model
        loaded.load_compressor(pretrained_model_name_or_path, hub, variant)
        loaded.config.adapter_only = False
        if loaded.can_generate():
            with contextlib.suppress(OSError):  # it has none: then the base's stays
                loaded.generation_config = GenerationConfig.from_pretrained(pretrained_model_name_or_path, **hub)
        return model

    def save_pretrained(self, save_directory, adapter_only: bool = False, state_dict=None, **kwargs):
        """Write the checkpoint with its code, so that it loads without rcc_hf.

        Args:
            adapter_only: write the compressor alone (the base is found again by `config.base_model_name_or_path`, or
                given to `from_pretrained` as `base_model`).

        Raises:
            ValueError: if the compressor is to be written alone while adapters of PEFT are in the model.
        """
        self.config.rcc_version = RCC_VERSION
        if self._auto_class is not None:
            self.config.auto_map = dict(AUTO_MAP)
        if not adapter_only:
            return super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)
        state_dict = self.state_dict() if state_dict is None else state_dict
        state_dict = {name: tensor for name, tensor in state_dict.items() if is_trained_part(name)}
        if getattr(self, "_hf_peft_config_loaded", False) or any(".modules_to_save." in name for name in state_dict):
            raise ValueError(
                "adapters of PEFT are in this model, so its compressor cannot be saved alone; merge_and_unload() them, "
                "or delete_adapter() those of add_adapter. Without adapter_only=True they themselves are saved"
            )
        self.config.adapter_only, self.config.base_fingerprint = True, fingerprint_base(_backbone(self))
        try:
            with quantisation_set_aside(self):
                return super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)
        finally:
            self.config.adapter_only, self.config.base_fingerprint = False, None

    def push_to_hub(self, repo_id: str, *, adapter_only: bool = False, **kwargs):
        """Upload the checkpoint with its code; arguments as for any model of transformers.

        Args:
            adapter_only: upload the compressor alone.
        """
        if not adapter_only:
            return super().push_to_hub(repo_id, **kwargs)  # type: ignore[arg-type]
        with tempfile.TemporaryDirectory() as folder:
            return self.save_pretrained(folder, adapter_only=True, push_to_hub=True, repo_id=repo_id, **kwargs)

    def freeze_base(self) -> None:
        """Let only the compressor's parameters be trained."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(is_trained_part(name))

    @classmethod
    def _read_config(cls, source, hub: dict, kwargs: dict) -> tuple[RCCConfig, dict]:
        """The configuration, changed by those of `kwargs` that are its fields; and the others."""
        _check_folder(source)
        found, _ = PreTrainedConfig.get_config_dict(source, **hub)
        if found.get("model_type") != cls.config_class.model_type:
            raise ValueError(
                f"{source} is a {found.get('model_type')!r} checkpoint, not an RCC one; "
                f"turn it into one with {cls.__name__}.from_base({str(source)!r})"
            )
        loading = {name: kwargs[name] for name in kwargs if name not in CONFIG_ARGUMENTS}
        changes = {name: kwargs[name] for name in kwargs if name in CONFIG_ARGUMENTS}
        return cls.config_class.from_pretrained(source, **hub, **changes), loading

    @classmethod
    def _load_base(cls, base, config, **kwargs):
        """A model with the weights of a base checkpoint and a fresh compressor."""
        _check_folder(base)
        family, wants_info = family_of(config.text_config), kwargs.pop("output_loading_info", False)
        mapping = {rf"^{family.backbone}\.": cls._decoder_prefix, rf"^{family.head}\.": "lm_head."}
        config._fresh_compressor = True
        try:
            loaded: Any = super().from_pretrained(
                base, config=config, key_mapping=mapping, output_loading_info=True, **kwargs
            )
        except RuntimeError as error:
            raise ValueError(f"the base at {base} does not fit its configuration: {error}") from error
        finally:
            del config._fresh_compressor
        model, info = loaded
        model.config.__dict__.pop("_fresh_compressor", None)
        model._weight_conversions = None  # or save_pretrained would give the weights the base's names again
        if info["missing_keys"]:
            raise ValueError(
                f"the base at {base} lacks weights that its configuration ({config.text_config.model_type}) needs: "
                f"{sorted(info['missing_keys'])[:5]} ..."
            )
        return (model, info) if wants_info else model

    def load_compressor(self, source: str | os.PathLike, hub: dict | None = None, variant: str | None = None) -> None:
        """Take the compressor's weights from an adapter-only checkpoint; the base stays as it is.

        Args:
            source: id on the Hub, or a folder.
            hub: `revision`, `token` and other arguments of downloading.
            variant: the one that `save_pretrained` wrote, if any.

        Raises:
            ValueError: if the weights are not those of this model's compressor in number, names and shapes.
        """
        own = {name: p for name, p in self.named_parameters() if is_trained_part(name)}
        prefix = self._decoder_prefix.removesuffix("language_model.")  # a backbone alone has none
        stored = {prefix + n.removeprefix("model."): t for n, t in _read_weights(source, hub or {}, variant).items()}
        wrong = {
            n for n in own.keys() | stored.keys() if n not in own or n not in stored or own[n].shape != stored[n].shape
        }
        if wrong:
            raise ValueError(
                f"the compressor in {source} does not fit its configuration; it differs in {sorted(wrong)[:5]}"
            )
        if any(p.device.type == "meta" for p in own.values()):
            raise ValueError(
                "an adapter-only checkpoint cannot be loaded with layers offloaded to disk; load it on a device, save "
                "it in full with save_pretrained, and load that"
            )
        self.load_state_dict(stored, strict=False)
        found, expected = fingerprint_base(_backbone(self)), self.config.base_fingerprint
        if expected is not None and found != expected:
            logger.warning(
                f"the base's weights (fingerprint {found}) are not those that this compressor was trained on "
                f"({expected}). That is expected if the base is quantised; otherwise give the right base_model."
            )


def _backbone(model) -> nn.Module:
    """The RCC model below a head, or the model itself."""
    return getattr(model, model.base_model_prefix, model)


def _read_weights(source, hub: dict, variant: str | None) -> dict[str, Tensor]:
    """All tensors of a checkpoint, in one file or several."""
    names = [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]
    if variant is not None:
        names = [f"{stem}.{variant}.{ending}" for stem, _, ending in (name.rpartition(".") for name in names)]
    file = cached_file(source, names[0], **hub, _raise_exceptions_for_missing_entries=False)
    if file is not None:
        return load_file(file)
    index = json.loads(Path(str(cached_file(source, names[1], **hub))).read_text())
    tensors: dict[str, Tensor] = {}
    for part in sorted(set(index["weight_map"].values())):
        tensors |= load_file(str(cached_file(source, part, **hub)))
    return tensors


def _sort_arguments(scheme: str, kwargs: dict) -> tuple[dict, dict, dict]:
    """Options of the scheme, fields of the configuration, arguments of loading."""
    known = (option_names(scheme), CONFIG_ARGUMENTS, LOADING_ARGUMENTS)
    unknown = sorted(set(kwargs).difference(*known))
    if unknown:
        raise TypeError(
            f"from_base() does not know {', '.join(unknown)}. Options of scheme {scheme!r}: {', '.join(known[0])}. "
            f"Fields of RCCConfig: {', '.join(known[1])}. Arguments of loading: {', '.join(known[2])}."
        )
    options, fields, loading = ({name: kwargs[name] for name in names if name in kwargs} for names in known)
    return options, fields, loading


def _check_folder(source) -> None:
    """Refuse an existing folder that is no checkpoint, before a lookup on the Hub hides the reason."""
    folder = Path(source)
    if not folder.is_dir():
        return
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} is no checkpoint: it has no config.json. Give a folder that save_pretrained wrote.")
    try:
        json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is damaged: {error}. Save or download the checkpoint again.") from error
