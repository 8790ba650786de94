"""What the kernels gain, measured: `python -m benchmarks`, see benchmarks/README.md.

registry.py says what there is to measure, timing.py reads the clocks, harness.py verifies and then times one case,
report.py and plots.py write what came out. One `bench_<stem>.py` per op describes its shapes and competitors.
"""
