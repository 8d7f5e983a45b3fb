"""Training with Lightning: module, optimizers, schedules, checkpoints, and the subcommands fit and validate."""

from ropepp_lit.malicious import refuse_malicious

refuse_malicious()
