"""A rank of the evaluate stage: deepspeed runners/evaluate.py EXPERIMENT.json --workdir DIR [--name NAME]."""

import sys

from ki_ds.cli.main import main

main(["worker", "evaluate", *sys.argv[1:]])
