"""`python -m digit` is `digit`."""

from digit.cli import program

program()
