"""`melt-serve verify`: certifies that this machine serves a checkpoint as the reference model computes it."""
