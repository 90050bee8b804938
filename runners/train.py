"""A rank of the train stage: deepspeed runners/train.py EXPERIMENT.json --workdir DIR [--name NAME]."""

import sys

from ki_ds.cli.main import main

main(["worker", "train", *sys.argv[1:]])
