"""The command lines, one module a command. `common` is what they share; nothing imports this package."""

import logging

assert logging.lastResort is not None
logging.getLogger("tinyllm").addHandler(logging.lastResort)  # warnings go to stderr, which the library leaves
