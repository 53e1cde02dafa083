"""Benchmarks: `python -m benchmarks.run --help`. Each case is checked for correctness before it is timed."""
