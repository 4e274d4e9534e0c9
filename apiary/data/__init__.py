"""Instruction data: read, checked, split over clients, and turned into tokens with a loss mask."""
