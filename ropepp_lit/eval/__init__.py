"""Evaluation: perplexity, retrieval, recall, noise, attention; results with intervals, and the page that shows them."""
