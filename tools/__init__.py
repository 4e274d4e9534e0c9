"""What makes the files that are shipped; not part of the package."""
