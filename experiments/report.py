"""`python -m experiments.report` is `barber report`."""

import sys

from barber.report.__main__ import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m experiments.report"))
