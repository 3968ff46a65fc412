"""New weights for a model that is loaded, quantized into the memory it has."""
