"""Measurements that the README and the docs cite; each writes JSON under `results/`."""
