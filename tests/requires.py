"""What vLLM's CPU build has for some processors only, and what cannot be tested on others."""

import pytest
import torch
import vllm._custom_ops  # noqa: F401 (loads what it has for this one)

needs_four_bits = pytest.mark.skipif(
    not hasattr(torch.ops._C, "cpu_gemm_wna16"), reason="vLLM has no 4-bit matmul for this processor"
)
needs_fp8_rows = pytest.mark.skipif(
    not (torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()),
    reason="vLLM has FP8 rows on x86 with AVX-512 or AMX only",
)
