"""A finished run as files that other tools load, with a model card."""
