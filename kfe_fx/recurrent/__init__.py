"""Recurrent layers: one operation for one direction of one layer, plain or batch-normalised."""
