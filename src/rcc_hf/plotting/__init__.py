# SPDX-License-Identifier: Apache-2.0
"""Figures of evaluations: reading metrics.json, choosing what belongs in one figure, drawing it, and saving it.

`results`, `series` and `labels` need no further package; everything else needs matplotlib (`rcc_hf[plot]`).
"""
