"""`python -m lib`: see `lib.course.cli`."""

import sys

from lib.course.cli import main

if __name__ == "__main__":
    sys.exit(main())
