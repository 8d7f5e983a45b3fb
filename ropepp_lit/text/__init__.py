"""What text is: the one entry of tokenizers, and where documents come from. Nothing here knows a model."""
