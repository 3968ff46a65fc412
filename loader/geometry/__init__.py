"""Where elements are: regions of parameters, layouts of codes and scales, spans of checkpoint tensors; no I/O."""
