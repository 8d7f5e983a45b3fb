"""`python -m ropepp_lit` is the command `ropepp-lit`."""

from ropepp_lit.cli import main

if __name__ == "__main__":
    main()
