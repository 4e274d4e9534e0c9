"""The built-in instruction corpus: made by rules from a seed."""
