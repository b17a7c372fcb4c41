"""Plans memory before anything is allocated."""
