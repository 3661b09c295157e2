"""Reads and writes the model files of other programs as our config and parameters."""
