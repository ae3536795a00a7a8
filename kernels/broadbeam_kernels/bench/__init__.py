"""Benchmarks: each operation against its floor and its peers, all measured in the same run."""
