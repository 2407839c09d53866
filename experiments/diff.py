"""`python -m experiments.diff` is `barber diff`."""

import sys

from barber.commands.diff import main
from barber.errors import UserError

if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:], "python -m experiments.diff"))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
