# SPDX-License-Identifier: Apache-2.0
"""What ships inside checkpoints: flat files that need torch and transformers only."""
