"""`python -m ki_ds.cli`: how launchers start ranks."""

from ki_ds.cli.main import main

main()
