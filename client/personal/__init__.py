"""A client's own model after a federation: candidates made of what it learnt alone and together, and its choice."""
