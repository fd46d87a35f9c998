"""Measure real engines: what a MELT and a LoopLM of one shape cost in memory and serve in a second, by depth."""
