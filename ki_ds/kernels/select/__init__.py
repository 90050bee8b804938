"""The teacher's side: from logits to packed targets."""
