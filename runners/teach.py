"""A rank of the teach stage: deepspeed runners/teach.py EXPERIMENT.json --workdir DIR [--name NAME]."""

import sys
from pathlib import Path

from ki_ds.cli.main import main

main(["worker", Path(__file__).stem, *sys.argv[1:]])
