"""Script for `ropepp-lit prepare`: python tools/prepare_data.py SOURCE... --out DIR --tokenizer NAME."""

import sys

from ropepp_lit.cli import main

if __name__ == "__main__":
    main(["prepare", *sys.argv[1:]])
