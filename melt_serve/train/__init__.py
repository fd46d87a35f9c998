"""Training of the bundled checkpoint: the task, its tokenizer and the recipe. Knows nothing of vLLM."""
