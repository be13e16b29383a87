"""The command lines, one module a command. `common` is what they share; no other part of tinyllm imports this
package, as the commands show the library's warnings, which programs see only where they ask for them."""

import logging

assert logging.lastResort is not None
logging.getLogger("tinyllm").addHandler(logging.lastResort)  # to stderr
