# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: peers, timing, suites and their report.

`headworks bench` prints the table of targets; `pytest bench -k <operator>` runs the performance
cases of the operator's specification under pytest-benchmark.
"""
