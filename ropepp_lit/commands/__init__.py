"""Subcommands implemented as functions: they parse and check arguments, call the library and print the result."""
