"""Tokenizers, chat templates and document readers. This package does not depend on models."""
