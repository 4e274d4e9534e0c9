"""Sweeps: many simulated runs that differ in a few keys, compared by rows that chose nothing."""
