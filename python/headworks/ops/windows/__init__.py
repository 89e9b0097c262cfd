# SPDX-License-Identifier: Apache-2.0
"""Operators over windows of an image."""
