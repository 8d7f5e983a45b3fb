"""Convert a checkpoint to a Hugging Face model; same as `ropepp-lit export`."""

import sys

from ropepp_lit.cli import main

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
