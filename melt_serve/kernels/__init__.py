"""MELT's own arithmetic, where a matmul or vLLM's attention kernel does not cover it."""
