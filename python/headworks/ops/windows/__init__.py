# SPDX-License-Identifier: Apache-2.0
"""Attention within windows of an image."""
