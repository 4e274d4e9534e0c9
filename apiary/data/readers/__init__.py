"""Rows out of each kind of file: a module for each family of formats, and `formats`, the table of all of them."""
