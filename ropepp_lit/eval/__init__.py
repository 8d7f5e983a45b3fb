"""Evaluation: perplexity, retrieval, noise, attention; results with confidence intervals, and the page that shows them."""
