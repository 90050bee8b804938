"""What a run will cost: FLOPs, memory, and whether it fits."""
