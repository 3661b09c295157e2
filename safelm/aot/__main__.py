"""`python -m safelm.aot`."""

from safelm.aot.command import command

if __name__ == "__main__":
    command()
