"""The files of a checkpoint: weights in safetensors, checked before they are used, and what lies beside them."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from melt_serve.checkpoint_config import read_json
from melt_serve.checkpoint_path import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
CARRIED_OVER = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
UNUSED = re.compile(r"lm_head\.weight|.*\.rotary_emb\.(inv_freq|cos_cached|sin_cached)")
"""Tensors that some checkpoints hold beside those that their config implies; no model reads them."""
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Shard:
    """One safetensors file of a checkpoint, its header read and found right."""

    path: Path
    dtypes: dict[str, torch.dtype]


def read_headers(source: Path, shapes: Shapes) -> list[Shard]:
    """Open every shard and check its tensors' names, shapes and dtypes; no values are read.

    Args:
        shapes: of the tensors that there must be, no more and no fewer.

    Raises:
        CheckpointError: a tensor is missing, left over or another, or a file is truncated.
    """
    shards = []
    seen: dict[str, Path] = {}
    for path in shard_paths(source):
        with opened(path, "np") as file:
            dtypes = {}
            for key in file.keys():  # noqa: SIM118 (not a dict)
                header = file.get_slice(key)
                shape, dtype = tuple(header.get_shape()), header.get_dtype()
                if key not in shapes:
                    if UNUSED.fullmatch(key):
                        continue
                    raise CheckpointError(
                        f"{path} holds the unexpected tensor {key}; is config.json that of this checkpoint?"
                    )
                if key in seen:
                    raise CheckpointError(f"{path} and {seen[key]} both hold {key}; remove the shard that is left over")
                if shape != shapes[key]:
                    raise CheckpointError(
                        f"{key} in {path} has shape {list(shape)}, config.json implies {list(shapes[key])}; "
                        "the two must come from the same checkpoint"
                    )
                if dtype not in DTYPES:
                    raise CheckpointError(
                        f"{key} in {path} has dtype {dtype}; use the unquantised checkpoint ({', '.join(DTYPES)})"
                    )
                seen[key], dtypes[key] = path, DTYPES[dtype]
            shards.append(Shard(path, dtypes))
    refuse_missing(source, [key for key in shapes if key not in seen])
    return shards


def check_quantized(source: Path, shapes: Shapes) -> None:
    """Check that a quantized checkpoint has some tensor for every layer; which ones is its format's affair.

    Raises:
        CheckpointError: it has none for a layer, or a file is truncated.
    """
    layers = set()
    for path in shard_paths(source):
        with opened(path, "np") as file:
            layers |= {key.rpartition(".")[0] for key in file.keys()}  # noqa: SIM118 (not a dict)
    refuse_missing(source, [key for key in shapes if key.rpartition(".")[0] not in layers])


def refuse_missing(source: Path, missing: list[str]) -> None:
    """Refuse a checkpoint that lacks tensors; the message names the first of them."""
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{source} lacks the tensor {missing[0]}{others}; download the checkpoint again")


def shard_paths(source: Path) -> list[Path]:
    """List the checkpoint's safetensors files, in the order of their names.

    Raises:
        CheckpointError: there are none, or one that the index names is not there.
    """
    if (source / SINGLE_FILE).is_file():
        return [source / SINGLE_FILE]
    index = source / INDEX_FILE
    if not index.is_file():
        if others := sorted(source.glob("*.safetensors")):
            return others
        if any(source.glob("*.bin")) or any(source.glob("*.pt*")):
            raise CheckpointError(
                f"{source} holds pickled weights only, which can run code when read; save them as safetensors first"
            )
        raise CheckpointError(f"{source} has neither {SINGLE_FILE} nor {INDEX_FILE}; download the checkpoint again")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; download it again")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not (source / name).is_file():
            raise CheckpointError(f"{index} names the shard {name}, which {source} lacks; download the shard again")
    return [source / name for name in names]


@contextmanager
def opened(path: Path, framework: str) -> Iterator[safe_open]:
    """Open a safetensors file, with its own complaints turned into ours."""
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file ({error}); download it again") from error


def verify_values(shard: Shard, bar: tqdm) -> None:
    """Refuse NaN and infinite weights, which would be found only as bad answers.

    Raises:
        CheckpointError: there is one.
    """
    with opened(shard.path, "pt") as file:
        for key in shard.dtypes:
            tensor = file.get_tensor(key)
            low, high = tensor.aminmax()  # unlike isfinite().all(), makes no tensor of the same size
            if not (low.isfinite() and high.isfinite()):
                raise CheckpointError(f"{key} in {shard.path} holds NaN or infinite values; download the shard again")
            bar.update(tensor.nbytes)


def copy_the_rest(source: Path, folder: Path) -> None:
    """Carry over what is not weights: tokenizer, chat template, generation defaults, licence."""
    for pattern in CARRIED_OVER:
        for path in source.glob(pattern):
            if path.is_file():
                copy = folder / path.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)


def licence_of(source: Path) -> str:
    """Return the line of a model card's head that names its licence; empty if none does."""
    readme = source / "README.md"
    head = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    licence = re.match(r"---\n(?:.*\n)*?(license: .*\n)", head)
    return licence[1] if licence else ""
