"""An engine whose rows our own kernel writes equals the reference, in both modes.

On a GPU that is so under vLLM's FlashAttention or Triton backend. Here a backend stands for them: plain PyTorch, but
over the same tables, slots and layout of the cache, and like them it reads K and V from the cache alone.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from melt_serve.engine import attention
from melt_serve.kernels import rows
from melt_serve.kernels.dispatch import KernelError
from tests.engine.engines import RIGHT, distance, engine, generate, prompts, save_melt


class PlainAttention(CPUAttentionBackendImpl):
    """Attention over rows that lie as vLLM's GPU backends have them, sequence by sequence."""

    def forward(self, layer, query, key, value, kv_cache, metadata, output, *_, **__):
        if metadata is None:
            return output
        caches = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        starts = metadata.query_start_loc.tolist()
        for request, length in enumerate(metadata.seq_lens.tolist()):
            own = slice(starts[request], starts[request + 1])
            k, v = (each[metadata.block_table[request]].flatten(0, 1)[:length].transpose(0, 1) for each in caches)
            q = query[own].transpose(0, 1)
            visible = torch.ones(q.shape[1], length, dtype=torch.bool).tril(length - q.shape[1])
            attended = F.scaled_dot_product_attention(q, k, v, visible, scale=self.scale, enable_gqa=True)
            output[own] = attended.transpose(0, 1)
        return output

    def do_kv_cache_update(self, layer, key, value, kv_cache, slots):
        """Write the rows of tokens that leave early; all others are written by the kernel."""
        k_cache, v_cache = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        blocks, places = slots // k_cache.shape[1], slots % k_cache.shape[1]
        k_cache[blocks, places], v_cache[blocks, places] = key, value


@pytest.fixture
def fused(monkeypatch):
    """Write rows as on a GPU; give the number of tokens in each call of the kernel."""
    written = []

    def count(write):
        written.append(len(write.q))
        rows.write_rows(write)

    monkeypatch.setattr(CPUAttentionBackend, "get_impl_cls", staticmethod(lambda: PlainAttention))
    monkeypatch.setattr(attention, "fuses_rows", lambda layer: True)
    monkeypatch.setattr(attention, "write_rows", count)
    return written


def test_only_on_a_gpu_and_if_asked_for_and_never_where_it_cannot_be(monkeypatch):
    def fuses(backend="FLASH_ATTN", dtype="auto"):
        layer = SimpleNamespace(attn_backend=SimpleNamespace(get_name=lambda: backend), kv_cache_dtype=dtype)
        return attention.fuses_rows(layer)

    monkeypatch.setenv("MELT_KERNELS", "triton")
    assert not fuses()
    monkeypatch.setattr(type(attention.current_platform), "is_cuda", lambda self: True)
    assert fuses() and fuses(dtype="fp8") and fuses("TRITON_ATTN")
    for refused, says in (({"backend": "FLASHINFER"}, "FLASHINFER"), ({"dtype": "fp8_e5m2"}, "fp8_e5m2")):
        with pytest.raises(KernelError, match=f"cannot run write_rows: .*{says}"):
            fuses(**refused)
    for unasked in ("auto", "reference"):
        monkeypatch.setenv("MELT_KERNELS", unasked)
        assert not fuses() and not fuses("FLASHINFER")


@pytest.mark.parametrize("mode", ["token", "chunk"])
def test_rows_written_by_the_kernel_are_the_references(tmp_path, fused, mode):
    model, asked = save_melt(tmp_path, decode_mode=mode), prompts(1, 33, 100)
    with engine(tmp_path) as llm:
        assert distance(model, asked, generate(llm, asked)) <= RIGHT
        assert distance(model, asked, generate(llm, asked, loops=6, exits=0.5), loops=6, exits=0.5) <= RIGHT
    tokens = sum(map(len, asked))
    assert len(fused) % 2 == 0 and sum(fused) > 2 * 4 * tokens  # layers, loops, tokens of the prompts alone
