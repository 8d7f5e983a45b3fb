"""Inputs, modifications and judges of tools/fuzz.py."""
