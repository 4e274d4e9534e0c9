"""The base model, its adapter, and how both are run."""
