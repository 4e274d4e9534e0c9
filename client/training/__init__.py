"""Local training: the loop, its objectives, and the private and gradient-free ways."""
