"""Stored teacher predictions: what is kept of them, how it is packed, and the shard files that hold it."""
