"""One page for each experiment: `python -m experiments.NAME --help`."""
