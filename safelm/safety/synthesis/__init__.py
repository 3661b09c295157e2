"""SafeWeb, RefuseWeb and Moral Education from scored documents (Maini et al. 2025, sections 3.2 to 3.4)."""
