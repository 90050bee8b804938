"""A rank of the teach stage: deepspeed runners/teach.py EXPERIMENT.json --workdir DIR [--name NAME]."""

import sys

from ki_ds.cli.main import main

main(["worker", "teach", *sys.argv[1:]])
