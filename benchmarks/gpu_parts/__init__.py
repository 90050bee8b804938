"""What a GPU must show, a part a file; `benchmarks/gpu.py` runs them."""
