"""The command lines, one module a command. `common` is what they share; nothing imports this package."""
