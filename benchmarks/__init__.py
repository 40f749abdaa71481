"""Benchmarks: piadm beside its peers on the same work."""
