"""A weight in its subspace: projection, bases, when and how they are renewed."""
