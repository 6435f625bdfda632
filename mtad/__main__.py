"""`python -m mtad`: the command line."""

from mtad.cli import main

if __name__ == "__main__":
    main()
