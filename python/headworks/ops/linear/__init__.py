# SPDX-License-Identifier: Apache-2.0
"""Linear attention and scans over keys."""
