# SPDX-License-Identifier: Apache-2.0
"""Ten minutes of a GPU, used to the last second: `ci/gpu.sh`. See README.md in this folder."""
