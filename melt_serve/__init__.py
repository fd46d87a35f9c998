"""Serve Memory-Efficient Looped Transformers (MELT) with vLLM."""
