"""`python -m quantload` is the `quantload` command."""

from .cli import main

if __name__ == "__main__":
    main()
