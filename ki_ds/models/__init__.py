"""Hugging Face models by name or configuration, and taken apart as backbone and head."""
