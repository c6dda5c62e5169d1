"""Reference networks, the scripts that trained them, and their small checkpoints."""
