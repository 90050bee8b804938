"""The ki-ds command, one file a group of commands."""

import os

# OpenMP's idle threads sleep instead of spinning: on a busy machine, those that spin take the cores from those that
# work (docs/results/threads.md). The runtime reads this when it is loaded, with torch: so it stands before all imports.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
