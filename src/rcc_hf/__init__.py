# SPDX-License-Identifier: Apache-2.0
"""Compressed context for any Llama- or Mistral-style checkpoint, as a plugin for transformers.

Importing the package registers `RCCConfig`, `RCCModel` and `RCCForCausalLM` with the Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from rcc_hf.modeling.compressed_rcc import RCCMemory
from rcc_hf.modeling.configuration_rcc import RCC_VERSION, RCCConfig
from rcc_hf.modeling.modeling_rcc import RCCForCausalLM, RCCModel
from rcc_hf.streams import RCCStream

__version__ = RCC_VERSION

AutoConfig.register(RCCConfig.model_type, RCCConfig, exist_ok=True)
AutoModel.register(RCCConfig, RCCModel, exist_ok=True)
AutoModelForCausalLM.register(RCCConfig, RCCForCausalLM, exist_ok=True)

# without these, save_pretrained would write no code, and nobody without rcc_hf could load the checkpoint
RCCConfig.register_for_auto_class()
RCCModel.register_for_auto_class("AutoModel")
RCCForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["RCCConfig", "RCCForCausalLM", "RCCMemory", "RCCModel", "RCCStream", "__version__"]
