"""`python -m ropepp_lit` is the command `ropepp-lit`."""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]  # the current folder; `main` adds it after the libraries
    from ropepp_lit.cli import main

    main()
