"""Micro-benchmarks: python -m bench."""
