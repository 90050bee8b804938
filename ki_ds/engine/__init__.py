"""The DeepSpeed engine: what its JSON may say, optimizers, checkpoints."""
