"""MELT and LoopLM inside vLLM: one file for each thing vLLM asks of a model. Never imports `melt_serve.modeling`."""
