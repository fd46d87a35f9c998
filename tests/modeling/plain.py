"""LoopLM and MELT once more, from modeling/README.md and a state dict alone: one token and head at a time."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from melt_serve.modeling import MeltForCausalLM, OuroForCausalLM

Row = tuple[Tensor, Tensor]  # K and V of a token, [KV heads, D] each


class Plain:
    """The arithmetic of one token x: [d] in one layer."""

    def __init__(self, model: OuroForCausalLM | MeltForCausalLM):
        self.weights = {key: weight.detach() for key, weight in model.state_dict().items()}
        self.config = model.config

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = torch.einsum("oi,i->o", self.weights[f"{name}.weight"], x)
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def norm(self, name: str, x: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean() + self.config.rms_norm_eps) * self.weights[f"{name}.weight"]

    def turned(self, heads: Tensor, position: int) -> Tensor:
        """Apply RoPE as a rotation of complex numbers; heads: [H, D]."""
        half = heads.shape[-1] // 2
        angles = position * self.config.rope_base ** (-torch.arange(half) / half)
        pairs = torch.complex(heads[:, :half], heads[:, half:]) * torch.polar(torch.ones(half), angles)
        return torch.cat((pairs.real, pairs.imag), dim=-1)

    def heads(self, layer: str, which: str, x: Tensor) -> Tensor:
        return self.linear(f"{layer}.self_attn.{which}_proj", x).view(-1, self.config.head_dim)

    def row(self, layer: str, source: Tensor, position: int) -> Row:
        return self.turned(self.heads(layer, "k", source), position), self.heads(layer, "v", source)

    def attended(self, layer: str, n: Tensor, position: int, rows: Sequence[Row]) -> Tensor:
        queries = self.turned(self.heads(layer, "q", n), position)
        group = len(queries) // self.config.num_key_value_heads
        outputs = []
        for head, query in enumerate(queries):
            keys = torch.stack([k[head // group] for k, _ in rows])
            values = torch.stack([v[head // group] for _, v in rows])
            shares = torch.softmax(torch.einsum("kd,d->k", keys, query) / query.numel() ** 0.5, dim=0)
            outputs.append(torch.einsum("k,kd->d", shares, values))
        return self.linear(f"{layer}.self_attn.o_proj", torch.cat(outputs))

    def finished(self, layer: str, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.norm(f"{layer}.input_layernorm_2", attended)
        m = self.norm(f"{layer}.post_attention_layernorm", x)
        gate, up = self.linear(f"{layer}.mlp.gate_proj", m), self.linear(f"{layer}.mlp.up_proj", m)
        down = self.linear(f"{layer}.mlp.down_proj", gate * torch.sigmoid(gate) * up)
        return x + self.norm(f"{layer}.post_attention_layernorm_2", down)

    def layers(self) -> list[str]:
        return [f"model.layers.{i}" for i in range(self.config.num_hidden_layers)]


class PlainLoopLM(Plain):
    """A LoopLM fed token by token, with a KV cache a (loop, layer)."""

    def __init__(self, model: OuroForCausalLM):
        super().__init__(model)
        self.cache: dict[tuple[int, str], list[Row]] = defaultdict(list)
        self.position = 0

    def step(self, token: int, loops: int, threshold: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return logits [e, V] and exit probabilities [e] after each loop; e is T, or less where the token exits."""
        x = self.weights["model.embed_tokens.weight"][token]
        logits, exits, stays = [], [], 1.0
        for loop in range(loops):
            for layer in self.layers():
                n = self.norm(f"{layer}.input_layernorm", x)
                self.cache[loop, layer].append(self.row(layer, n, self.position))
                attended = self.attended(layer, n, self.position, self.cache[loop, layer])
                x = self.finished(layer, x, attended)
            x = self.norm("model.norm", x)
            logits.append(self.linear("lm_head", x))
            exits.append(torch.sigmoid(self.linear("model.early_exit_gate", x))[0])
            stays *= 1 - exits[-1].item()
            if threshold < 1 and 1 - stays >= threshold:
                break
        for later in range(len(logits), loops):  # last exited
            for layer in self.layers():
                self.cache[later, layer].append(self.cache[len(logits) - 1, layer][-1])
        self.position += 1
        return torch.stack(logits), torch.stack(exits)


class PlainMelt(Plain):
    """A MELT with an element-wise gate that starts from its input, fed chunk by chunk."""

    def __init__(self, model: MeltForCausalLM):
        super().__init__(model)
        self.final: dict[str, list[Row]] = defaultdict(list)
        self.position = 0

    def chunk(self, tokens: Sequence[int], loops: int, threshold: float = 1.0) -> Tensor:
        """Return logits after each token's last loop, [tokens, V]; with a threshold below 1, tokens may exit early."""
        xs = [self.weights["model.embed_tokens.weight"][token] for token in tokens]
        states: dict[tuple[str, int], Tensor] = {}
        own: dict[str, dict[int, Row]] = {layer: {} for layer in self.layers()}
        stayed = dict.fromkeys(range(len(xs)), 1.0)
        for loop in range(1, loops + 1):
            for layer in self.layers():
                for i in stayed:
                    n = self.norm(f"{layer}.input_layernorm", xs[i])
                    h = states[layer, i] = self.gated(layer, n, states.get((layer, i)), loop)
                    own[layer][i] = self.row(layer, h, self.position + i)
                    rows = self.final[layer] + [own[layer][j] for j in range(i + 1)]
                    xs[i] = self.finished(layer, xs[i], self.attended(layer, n, self.position + i, rows))
            for i in list(stayed):
                xs[i] = self.norm("model.norm", xs[i])
                stayed[i] *= 1 - torch.sigmoid(self.linear("model.early_exit_gate", xs[i])).item()
                if threshold < 1 and 1 - stayed[i] >= threshold:
                    del stayed[i]
        for layer, rows in own.items():
            self.final[layer] += [rows[i] for i in range(len(xs))]
        self.position += len(tokens)
        return torch.stack([self.linear("lm_head", x) for x in xs])

    def gated(self, layer: str, n: Tensor, h: Tensor | None, loop: int) -> Tensor:
        if h is None:
            return n
        gate = f"{layer}.self_attn.kv_gate"
        logits = self.linear(f"{gate}.input_proj", n) + self.linear(f"{gate}.state_proj", h)
        if f"{gate}.loop_bias" in self.weights:
            logits = logits + self.weights[f"{gate}.loop_bias"][loop - 2]
        z = torch.sigmoid(logits)
        return z * h + (1 - z) * n
