"""What Slurm tells a task, and a stand-in for its programs."""

import os


def srun(tools, **changes):
    """The environment of a task of a step of two; programs in `tools` come first."""
    return {
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", **changes,
    }  # fmt: skip


def stand_in(folder, script):
    """An `scontrol` of this folder."""
    (folder / "scontrol").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "scontrol").chmod(0o755)
