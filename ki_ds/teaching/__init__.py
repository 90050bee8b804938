"""Teachers: their engines, and how ranks share the work."""
