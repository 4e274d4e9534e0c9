"""Differential privacy: accounting, the ledger, sampling, noise, and what may be claimed."""
