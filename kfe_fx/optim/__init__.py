"""Optimizers that precondition with the curvature of the taps."""
