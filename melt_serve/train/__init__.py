"""Post-training of a LoopLM into a MELT: recipes, runs, what they take, studies. Knows nothing of vLLM."""
