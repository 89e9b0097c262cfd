# SPDX-License-Identifier: Apache-2.0
"""Softmax-type attention and what reads its weights."""
