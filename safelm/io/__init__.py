"""Local files: written whole or not at all, locked by one process, and the small JSON records kept in them."""
