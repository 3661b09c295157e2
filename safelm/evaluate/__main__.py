"""`python -m safelm.evaluate`."""

from safelm.evaluate.commands.measure import command

if __name__ == "__main__":
    command()
