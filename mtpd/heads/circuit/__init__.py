"""Circuit heads: the joint distribution of a window of tokens as a probabilistic circuit."""
