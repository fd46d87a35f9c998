"""Measurements: what a MELT and a LoopLM of one shape take and serve, on real engines; kernels; the reference model."""
