"""Other programs' model files, read into and written from our config and parameters."""
