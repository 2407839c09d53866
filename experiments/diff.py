"""What two runs have in common and what not: settings, masks, results.

    python -m experiments.diff RUN_FOLDER OTHER_RUN_FOLDER

Masks are compared where both folders hold them: exported with export=masks.
"""

import sys

from barber.errors import UserError
from barber.run.compare import compare

if __name__ == "__main__":
    if len(sys.argv) != 3:
        print("usage: python -m experiments.diff RUN_FOLDER OTHER_RUN_FOLDER", file=sys.stderr)
        sys.exit(2)
    try:
        print(compare(sys.argv[1], sys.argv[2]))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
