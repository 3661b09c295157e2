"""The subcommands of `python -m safelm.evaluate` and their flags."""
