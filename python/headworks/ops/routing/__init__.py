# SPDX-License-Identifier: Apache-2.0
"""Attention of queries to chosen keys, and the choice."""
