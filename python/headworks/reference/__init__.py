# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch definitions of every operator, in the symbols of the papers.

They materialise whatever they like, are differentiable any number of times, and run wherever torch
runs. In fp64 they are the oracle that every backend is compared with; ``backend="reference"`` of a
public function calls them.
"""
