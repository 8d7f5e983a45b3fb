"""Evaluation: perplexity, retrieval, noise, attention; results with intervals, and the page that shows them."""
