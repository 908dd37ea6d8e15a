"""A look at a folder of good images before a training: what cannot be used, and what is unlike the rest."""
