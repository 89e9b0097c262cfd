# SPDX-License-Identifier: Apache-2.0
"""Operators on the windows of images."""
