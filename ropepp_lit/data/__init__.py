"""Text to token shards to batches."""

from ropepp_lit.malicious import refuse_malicious

refuse_malicious()
