"""The parts of the GPU run, in order of worth."""

from gpu_parts import (
    claim,
    correctness,
    environment,
    loss_speed,
    marked,
    precision,
    sweep,
    teacher_speed,
    training_speed,
)
from gpu_parts.part import Part

PARTS = [
    Part("environment", "what is there, and what the card does at best", 90, environment.rows),
    Part("right-first", "the kernels against float64, on the device", 420, correctness.rows),
    Part("pytest", "what else of the tests only a GPU shows", 300, marked.rows),
    Part("loss-speed", "the loss and the selection beside floors and peers", 420, loss_speed.rows),
    Part("sweep", "block sizes, warps, rows of a chunk", 150, sweep.rows),
    Part("teacher-speed", "the teach stage beside the bare forward pass", 240, teacher_speed.rows),
    Part("training-speed", "self-learning and inheritance, side by side", 480, training_speed.rows),
    Part("precision", "fp32, bf16, fp16 and ZeRO on the same text", 300, precision.rows),
    Part("claim", "a larger model that inherits, and one that learns alone", 600, claim.rows),
]
