"""Starting ranks, watching them, and what they say to one another."""
