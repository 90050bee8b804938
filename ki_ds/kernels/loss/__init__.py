"""The knowledge-inheritance loss: the definition, and what is faster."""
