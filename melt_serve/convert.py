"""An Ouro-format checkpoint into a MELT one: the same weights plus a fresh gate (arXiv 2605.07721).

Adding the gate renames nothing, so a shard is verified tensor by tensor and its file copied as it is;
the gate goes into shards of its own. Memory stays near one shard, whatever the checkpoint's size.
"""

import json
import math
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from melt_serve.config import DecodeMode, GateType, InitialState, LoopLMConfig, MeltConfig, sharing_unit, weight_shapes
from melt_serve.modeling.gate import GATE_BIAS, GATE_WEIGHT_STD

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
GATE_SHARD_BYTES = 256 << 20
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
VLLM_BLOCK_SIZE = 16  # vLLM's default, when the user names none
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

Shapes = dict[str, tuple[int, ...]]


class ConversionError(ValueError):
    """The checkpoint cannot be converted; the message names the thing and the remedy."""


@dataclass(frozen=True)
class Shard:
    """One safetensors file of the source, its header read and found right."""

    path: Path
    dtypes: dict[str, torch.dtype]


def convert(
    source: Path,
    target: Path,
    *,
    gate_type: GateType = "elementwise",
    initial_state: InitialState = "input",
    chunk_size: int = 512,
    decode_mode: DecodeMode = "token",
    max_loops: int | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> None:
    """Write the checkpoint at `source` (Ouro format, safetensors) to `target` as a MELT with a fresh gate.

    The gate starts at the reference model's values in the source's dtype, and is
    the same for the same seed however the source is sharded. `target` appears whole or not at all.

    Args:
        source: the checkpoint's folder.
        target: the folder to write, which does not exist or is empty.
        max_loops: the most loops a request may ask for, by default the source's `total_ut_steps`.

    Raises:
        ConversionError: the source is not a whole, finite Ouro-format checkpoint, the target is
            taken, the options do not fit, or the disk is too small.
        OSError: the disk fails on the way.
    """
    source, target = source.resolve(), target.resolve()
    check_folders(source, target)
    fields = read_config(source)
    melt_fields = {
        **{key: value for key, value in fields.items() if key != "auto_map"},
        "model_type": MeltConfig.model_type,
        "architectures": ["MeltForCausalLM"],
        "kv_gate_type": gate_type,
        "kv_gate_initial_state": initial_state,
        "chunk_size": chunk_size,
        "decode_mode": decode_mode,
        "max_loops": max_loops,
    }
    try:
        shapes = dict(weight_shapes(LoopLMConfig(**fields)))
        melt = MeltConfig(**melt_fields)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ConversionError(
            f"{source / 'config.json'} and the options do not fit: {error.__cause__ or error}"
        ) from error
    shards = read_headers(source, shapes)
    dtypes = {key: dtype for shard in shards for key, dtype in shard.dtypes.items()}
    gate = {key: shape for key, shape in weight_shapes(melt) if key not in shapes}
    gate_dtype = dtypes["model.embed_tokens.weight"]
    gate_parts = split_gate(gate, gate_dtype)
    source_bytes = sum(math.prod(shapes[key]) * dtype.itemsize for key, dtype in dtypes.items())
    total_bytes = source_bytes + sum(map(math.prod, gate.values())) * gate_dtype.itemsize
    check_space(target, total_bytes)
    warn_about_blocks(chunk_size)

    bar = tqdm(total=source_bytes, desc="convert", unit="B", unit_scale=True, disable=not show_progress)
    with staged(target) as folder, bar:
        count = len(shards) + len(gate_parts)
        names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        weight_map = {}
        for shard, name in zip(shards, names, strict=False):
            verify_values(shard, bar)
            shutil.copyfile(shard.path, folder / name)
            weight_map.update(dict.fromkeys(shard.dtypes, name))
        generator = torch.Generator().manual_seed(seed)
        for part, name in zip(gate_parts, names[len(shards) :], strict=True):
            tensors = {key: fresh(key, shape, generator).to(gate_dtype) for key, shape in part.items()}
            save(tensors, folder / name)
            weight_map.update(dict.fromkeys(part, name))
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
        write_json(folder / "config.json", {**melt_fields, "max_loops": melt.max_loops})
        copy_the_rest(source, folder)
        (folder / "README.md").write_text(card(source, melt, seed), encoding="utf-8")


def check_folders(source: Path, target: Path) -> None:
    """Refuse folders that cannot be read from or written to."""
    if not source.exists():
        raise ConversionError(f"the source {source} does not exist; name the folder of an Ouro-format checkpoint")
    if not source.is_dir():
        raise ConversionError(f"the source {source} is not a folder; name the folder that holds its config.json")
    if target == source or source in target.parents:
        raise ConversionError(f"the target {target} lies in the source {source}; choose a folder outside it")
    if target.exists() and not target.is_dir():
        raise ConversionError(f"the target {target} is a file; choose a new folder")
    if target.exists() and any(target.iterdir()):
        raise ConversionError(f"the target {target} exists and is not empty; choose a new folder or empty it")


def read_config(source: Path) -> dict[str, object]:
    """The fields of an Ouro-format `config.json`."""
    path = source / "config.json"
    if not path.is_file():
        raise ConversionError(f"{source} has no config.json; name the folder of an Ouro-format checkpoint")
    fields = read_json(path)
    model_type = fields.get("model_type")
    if model_type == MeltConfig.model_type:
        raise ConversionError(f"{source} is a MELT checkpoint already; serve it, or convert the LoopLM it came from")
    if model_type != LoopLMConfig.model_type:
        raise ConversionError(f"{path} says model_type={model_type!r}; only Ouro-format checkpoints can be converted")
    return fields


def read_json(path: Path) -> dict[str, object]:
    """A JSON file that holds an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds no JSON object; download it again")
    return content


def read_headers(source: Path, shapes: Shapes) -> list[Shard]:
    """Open every shard, check its tensors' names, shapes and dtypes; no values are read."""
    shards = []
    seen: dict[str, Path] = {}
    for path in shard_paths(source):
        with opened(path, "np") as file:
            dtypes = {}
            for key in file.keys():  # noqa: SIM118 (not a dict)
                header = file.get_slice(key)
                shape, dtype = tuple(header.get_shape()), header.get_dtype()
                if key not in shapes:
                    raise ConversionError(
                        f"{path} holds the unexpected tensor {key}; is config.json that of this checkpoint?"
                    )
                if key in seen:
                    raise ConversionError(f"{path} and {seen[key]} both hold {key}; remove the shard that is left over")
                if shape != shapes[key]:
                    raise ConversionError(
                        f"{key} in {path} has shape {list(shape)}, config.json implies {list(shapes[key])}; "
                        "the two must come from the same checkpoint"
                    )
                if dtype not in DTYPES:
                    raise ConversionError(
                        f"{key} in {path} has dtype {dtype}; convert the unquantised checkpoint ({', '.join(DTYPES)})"
                    )
                seen[key], dtypes[key] = path, DTYPES[dtype]
            shards.append(Shard(path, dtypes))
    if missing := [key for key in shapes if key not in seen]:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConversionError(f"{source} lacks the tensor {missing[0]}{others}; download the checkpoint again")
    return shards


def shard_paths(source: Path) -> list[Path]:
    """The checkpoint's safetensors files, in the order of their names."""
    if (source / SINGLE_FILE).is_file():
        return [source / SINGLE_FILE]
    index = source / INDEX_FILE
    if not index.is_file():
        if any(source.glob("*.bin")) or any(source.glob("*.pt*")):
            raise ConversionError(
                f"{source} holds pickled weights only, which can run code when read; save them as safetensors first"
            )
        raise ConversionError(f"{source} has neither {SINGLE_FILE} nor {INDEX_FILE}; download the checkpoint again")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{index} has no weight_map; download it again")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not (source / name).is_file():
            raise ConversionError(f"{index} names the shard {name}, which {source} lacks; download the shard again")
    return [source / name for name in names]


@contextmanager
def opened(path: Path, framework: str) -> Iterator[safe_open]:
    """A safetensors file, with its own complaints turned into ours."""
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except SafetensorError as error:
        raise ConversionError(f"{path} is truncated or no safetensors file ({error}); download it again") from error


def verify_values(shard: Shard, bar: tqdm) -> None:
    """Refuse NaN and infinite weights, which would be found only as bad answers."""
    with opened(shard.path, "pt") as file:
        for key in shard.dtypes:
            tensor = file.get_tensor(key)
            low, high = tensor.aminmax()  # unlike isfinite().all(), makes no tensor of the same size
            if not (low.isfinite() and high.isfinite()):
                raise ConversionError(f"{key} in {shard.path} holds NaN or infinite values; download the shard again")
            bar.update(tensor.nbytes)


def split_gate(gate: Shapes, dtype: torch.dtype) -> list[Shapes]:
    """The gate's tensors in shards of at most GATE_SHARD_BYTES (or one tensor, where that is larger)."""
    parts: list[Shapes] = []
    size = GATE_SHARD_BYTES
    for key, shape in gate.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if size + nbytes > GATE_SHARD_BYTES:
            parts.append({})
            size = 0
        parts[-1][key] = shape
        size += nbytes
    return parts


def fresh(key: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """A gate tensor as the reference model starts it: W_z, U_z ~ N(0, 0.02), b_z = -2."""
    if key.endswith(".bias"):
        return torch.full(shape, GATE_BIAS)
    return torch.empty(shape).normal_(std=GATE_WEIGHT_STD, generator=generator)


def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """A safetensors file; a failing disk is an OSError here too."""
    path.touch()
    rights = path.stat().st_mode
    try:
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(rights)  # as of any new file; safetensors would keep it from all other users
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def check_space(target: Path, needed: int) -> None:
    """Refuse a disk that cannot hold the target."""
    existing = next(parent for parent in target.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ConversionError(
            f"the target {target} needs {needed / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB free; "
            "free some, or choose another disk"
        )


def warn_about_blocks(chunk_size: int) -> None:
    """Say when vLLM's default blocks and this chunk size rarely end together: hits in a prefix cache will be rare."""
    unit = sharing_unit(chunk_size, VLLM_BLOCK_SIZE)
    if unit > chunk_size:
        better = max(VLLM_BLOCK_SIZE, 1 << (chunk_size - 1).bit_length())
        print(
            f"warning: chunk_size={chunk_size} is not a multiple of vLLM's default block of {VLLM_BLOCK_SIZE}: prompts "
            f"will share cached prefixes only in steps of {unit} tokens; a chunk size of {better} avoids that",
            file=sys.stderr,
        )


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A folder beside `target` that becomes it at the end, or vanishes: on errors, Ctrl-C and SIGTERM."""
    new_parents = [parent for parent in target.parents if not parent.exists()]
    folder = target.with_name(f".{target.name}.partial")
    ours = False
    with signals_as_exceptions():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                ours = True
                folder.mkdir()
            except FileExistsError:
                ours = False
                raise ConversionError(
                    f"{folder} exists: another conversion is at work, or was killed; remove it"
                ) from None
            yield folder
            folder.rename(target)
        except BaseException:
            ignore_signals()
            if ours:
                shutil.rmtree(folder, ignore_errors=True)
            for parent in new_parents:
                with suppress(OSError):
                    parent.rmdir()
            raise


@contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """Let the first signal to end raise an exception, so that clean-up runs, and ignore those after it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals only ever interrupt the main thread
        return
    before = {each: signal.getsignal(each) for each in ENDING_SIGNALS}
    try:
        for each, handler in before.items():
            if handler != signal.SIG_IGN:  # as under nohup
                signal.signal(each, leave)
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def leave(signum: int, _: object) -> None:
    """Turn a signal into the exception that ends the program."""
    ignore_signals()
    raise KeyboardInterrupt if signum == signal.SIGINT else SystemExit(128 + signum)


def ignore_signals() -> None:
    """Keep an impatient second Ctrl-C from cutting the clean-up short."""
    if threading.current_thread() is threading.main_thread():
        for each in ENDING_SIGNALS:
            signal.signal(each, unheard)


def unheard(*_: object) -> None:
    """Ignore a signal; unlike with SIG_IGN, Python does not complain about one that has arrived already."""


def copy_the_rest(source: Path, folder: Path) -> None:
    """Carry over what is not weights: tokenizer, chat template, generation defaults, licence."""
    for pattern in CARRIED_OVER:
        for path in source.glob(pattern):
            if path.is_file():
                copy = folder / path.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)


def card(source: Path, config: MeltConfig, seed: int) -> str:
    """The README of the converted checkpoint."""
    return f"""\
---
{licence_of(source)}library_name: melt_serve
---

# {source.name}, converted to MELT

Made by `melt-serve convert` from the LoopLM `{source.name}`: its weights unchanged, plus a fresh KV gate.

| | |
|---|---|
| gate | {config.kv_gate_type}, initial state: {config.kv_gate_initial_state}, seed {seed} |
| loops | {config.total_ut_steps} by default, at most {config.max_loops} |
| chunks | {config.chunk_size} tokens, decode mode: {config.decode_mode} |

The gate is untrained: post-train this checkpoint (arXiv 2605.07721) before judging its answers.
"""


def licence_of(source: Path) -> str:
    """The line of a model card's head that names its licence; empty if none does."""
    readme = source / "README.md"
    head = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    licence = re.match(r"---\n(?:.*\n)*?(license: .*\n)", head)
    return licence[1] if licence else ""


def write_json(path: Path, content: object) -> None:
    """JSON as Hugging Face writes it: indented, with a line end."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
