"""The same API built in several ways, each as its own documentation teaches, and how fast each is.

``python -m benchmarks``, or ``make bench``. docs/benchmarks.md says what was measured.
"""
