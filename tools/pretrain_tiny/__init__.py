"""How the built-in base model is made."""
