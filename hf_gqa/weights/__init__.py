"""Floor 1: attention weights as tensors in one canonical form, without modules."""
