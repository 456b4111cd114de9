# SPDX-License-Identifier: Apache-2.0
"""Evaluation: examples, generated and read; methods that keep contexts; runs over them, metrics, and their folders.

Examples and folders have the schema of kvpress (https://github.com/NVIDIA/kvpress/tree/main/evaluation), so that
results of both can be laid side by side.
"""
