"""`python -m quantload` is the `quantload` command."""

from .cli import program

if __name__ == "__main__":
    program()
