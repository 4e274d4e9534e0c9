"""What an update tells of the rows behind it: the arithmetic of attacks that measure it. No model is asked here."""
