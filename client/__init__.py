"""What runs at a client: local training on data that does not leave it."""
