"""What a model is worth: losses and answers on held-out rows, compared between methods."""
