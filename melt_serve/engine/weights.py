"""What is loaded into a model: every tensor that its config implies, of that shape, and finite.

vLLM lets linear layers keep whatever memory held where a checkpoint has nothing for them, and copies any dtype into the
model's. Both would be found only as bad answers.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from melt_serve.config import LoopLMConfig, weight_shapes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class WeightChecks:
    """The checks of one loading, made while its tensors pass through, under the names that the checkpoint gives them.

    Args:
        quantized: layers may have other tensors than the config implies; each must have some.
    """

    def __init__(self, config: LoopLMConfig, quantized: bool):
        self.family = config.family
        self.shapes = dict(weight_shapes(config))
        self.quantized = quantized
        self.seen: set[str] = set()

    def watch(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights as they come.

        Raises:
            ValueError: one has another shape or dtype than it must have, or holds NaN or infinite values.
        """
        for name, weight in weights:
            expected = None if self.quantized else self.shapes.get(name)
            if expected is not None and tuple(weight.shape) != expected:
                raise ValueError(
                    f"{self.family}: {name} has shape {list(weight.shape)}, config.json implies {list(expected)}; the "
                    "two must come from the same checkpoint"
                )
            if expected is not None and weight.dtype not in DTYPES:
                raise ValueError(
                    f"{self.family}: {name} has dtype {weight.dtype}; save it as one of {', '.join(map(str, DTYPES))}"
                )
            if not is_finite(weight):
                raise ValueError(
                    f"{self.family}: {name} holds NaN or infinite values; download or export the checkpoint again"
                )
            self.seen.add(name)
            yield name, weight

    def refuse_missing(self) -> None:
        """Refuse a checkpoint that has nothing for some part of the model.

        Raises:
            ValueError: it lacks a tensor; the message names the first.
        """
        layers = {layer_of(name) for name in self.seen}
        held = layers if self.quantized else self.seen
        missing = [name for name in self.shapes if (layer_of(name) if self.quantized else name) not in held]
        if missing:
            others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(
                f"{self.family}: the checkpoint lacks the tensor {missing[0]}{others}; download or export it again"
            )


def layer_of(name: str) -> str:
    """Return the layer that a tensor belongs to: `a.b` of `a.b.weight`."""
    return name.rpartition(".")[0]


def is_finite(weight: Tensor) -> bool:
    """Return whether all values are; as fast as memory is read, and without a tensor of the same size."""
    if not weight.is_floating_point() or not weight.numel() or weight.element_size() == 1:  # 8 bits: none has aminmax
        return True
    low, high = weight.aminmax()
    return bool(low.isfinite() and high.isfinite())
