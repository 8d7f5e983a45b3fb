"""What tools/fuzz.py changes, how it changes it, and what is right then."""
