"""MELT inside vLLM: one file for each thing vLLM asks of us. Never imports `melt_serve.modeling`."""
