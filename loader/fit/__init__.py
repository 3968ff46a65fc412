"""Which scheme for which module, and whether a load fits: what schemes take, what they are expected to lose."""
