"""Labels: which slices of which tensors can only be removed together."""
