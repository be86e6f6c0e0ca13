"""The first minutes on a GPU: what breaks, what is slower than stock, and by how much, most valuable first."""
