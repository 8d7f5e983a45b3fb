"""Training with Lightning: module, optimizers, schedules, checkpoints, and the subcommands fit and validate."""
