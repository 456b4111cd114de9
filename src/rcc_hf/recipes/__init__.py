# SPDX-License-Identifier: Apache-2.0
"""A training in one file: model, texts, objectives, curriculum and settings."""

from rcc_hf.recipes.building import OBJECTIVES, Sources, build_objectives
from rcc_hf.recipes.recipe import Recipe, merge, read_recipe
from rcc_hf.recipes.sources import read_sources

__all__ = ["OBJECTIVES", "Recipe", "Sources", "build_objectives", "merge", "read_recipe", "read_sources"]
