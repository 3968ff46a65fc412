"""From routes to pieces: what is read at once, in which order, and how it reaches the closures of `online/`."""
