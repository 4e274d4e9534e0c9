"""What a run writes down as it goes: events, the run directory, metrics, progress."""
