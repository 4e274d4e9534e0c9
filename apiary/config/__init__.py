"""The configuration: its schema, where it comes from, what its parts say of each other."""
