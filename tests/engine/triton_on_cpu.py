"""A plugin of pytest that lets vLLM's GPU runner find a Triton for CPUs: Triton's interpreter, with TRITON_INTERPRET=1.

vLLM asks Triton for a backend named "cpu" with an active driver. The interpreter needs nothing of either.
"""

import triton.backends


class Driver:
    """Says that there is a device."""

    @staticmethod
    def is_active() -> bool:
        return True


triton.backends.backends["cpu"] = triton.backends.Backend(compiler=None, driver=Driver)
