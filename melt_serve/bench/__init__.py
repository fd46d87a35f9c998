"""Measure real engines: what a MELT and a LoopLM of one shape cost in memory, and what they serve in a second."""
