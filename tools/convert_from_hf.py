"""Convert a Hugging Face model to a checkpoint; same as `ropepp-lit import`."""

import sys

from ropepp_lit.cli import main

if __name__ == "__main__":
    main(["import", *sys.argv[1:]])
