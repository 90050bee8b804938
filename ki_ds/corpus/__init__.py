"""Text to tokens, and the endless deterministic stream of (sequence, view) pairs over them."""
