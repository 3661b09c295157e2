"""`python -m safelm.ladder`."""

from safelm.ladder.command import command

if __name__ == "__main__":
    command()
