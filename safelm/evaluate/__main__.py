"""Measures checkpoints on a suite of prompts: harmful answers, over-refusal, and measures that need no decoding."""

from safelm.evaluate.commands.measure import command

if __name__ == "__main__":
    command()
