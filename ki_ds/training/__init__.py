"""The training loop, its batches, and validation."""
