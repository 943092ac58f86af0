"""Learning from language feedback (ILF, Scheurer et al. 2023): data, refinements, and learning from them."""
