"""`python -m rehearsal`."""

import sys

from rehearsal.run import main

if __name__ == "__main__":
    sys.exit(main())
