# SPDX-License-Identifier: Apache-2.0
"""Evaluation without a model: examples, generated and read; metrics; and the folder that a run writes.

Examples and folders have the schema of kvpress (https://github.com/NVIDIA/kvpress/tree/main/evaluation), so that
results of both can be laid side by side.
"""
