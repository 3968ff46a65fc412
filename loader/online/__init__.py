"""The `weight_loader` closures: they quantize, copy or write out what arrives. No transformers, nothing of `model/`."""
