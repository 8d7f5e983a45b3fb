"""Prepare text as token shards, and load token shards as batches."""

from ropepp_lit.malicious import refuse_malicious

refuse_malicious()
