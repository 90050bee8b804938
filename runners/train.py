"""One rank of the train stage, for launchers: deepspeed runners/train.py EXPERIMENT.json --workdir DIR [--name NAME]."""

import sys

from ki_ds.cli import main

main(["worker", "train", *sys.argv[1:]])
