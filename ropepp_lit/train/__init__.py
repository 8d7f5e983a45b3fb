"""Training with Lightning: module, optimizers, schedules, checkpoints, and the subcommands fit, validate and plan."""

from ropepp_lit.malicious import refuse_malicious

refuse_malicious()
