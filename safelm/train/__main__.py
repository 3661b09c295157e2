"""`python -m safelm.train`."""

from safelm.train.run import command

if __name__ == "__main__":
    command()
