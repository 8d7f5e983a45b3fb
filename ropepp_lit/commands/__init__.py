"""The subcommands that are functions, one file each: parse, check, call, print."""
