"""What `python -m safelm.evaluate` can be asked to do, and its flags."""
