"""How good are the samples: distances between sets of features."""
