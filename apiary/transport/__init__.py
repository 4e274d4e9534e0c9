"""How updates travel: codecs both ways, and Flower's records."""
