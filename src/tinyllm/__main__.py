"""`python -m tinyllm`: the command `tinyllm`."""

import sys

from tinyllm.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
