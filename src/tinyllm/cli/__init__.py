"""The command lines, one module a command. `commands` has the table of them, `common` is what they share; no
other part of tinyllm imports this package, as the commands show the library's warnings, which programs see
only where they ask for them."""

import logging

assert logging.lastResort is not None
logging.getLogger("tinyllm").addHandler(logging.lastResort)  # to stderr

prefix = "tinyllm-"  # of a command's name, as it was called: `tinyllm ` where it is a subcommand
