"""`python -m bench`: the same as `python -m lib bench`."""

import sys

from lib.course.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
