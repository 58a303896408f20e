"""The run directory, its checkpoints, and what a MODEL argument names."""
