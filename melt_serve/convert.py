"""Conversion of an Ouro-format checkpoint into a MELT: the same weights plus a fresh gate (arXiv 2605.07721).

Adding the gate renames nothing, so a shard is verified tensor by tensor and its file copied as it is;
the gate goes into shards of its own. Memory stays near one shard, whatever the checkpoint's size.
"""

import json
import math
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from melt_serve.answers import note_end_marks
from melt_serve.checkpoint_check import read_looplm
from melt_serve.checkpoint_files import (
    INDEX_FILE,
    Shapes,
    copy_the_rest,
    licence_of,
    verify_values,
)
from melt_serve.checkpoint_path import CheckpointError
from melt_serve.checksums import write_sums
from melt_serve.config import DecodeMode, GateType, InitialState, MeltConfig, sharing_unit, weight_shapes
from melt_serve.modeling.gate import GATE_BIAS, fresh_weight_std

GATE_SHARD_BYTES = 256 << 20
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
DEEP_EFFORTS = ("high", "xhigh", "max")
"""Values of `reasoning_effort` that ask for more loops than the default, where a checkpoint runs more."""
VLLM_BLOCK_SIZE = 16  # vLLM's default, when the user names none


class ConversionError(CheckpointError):
    """The checkpoint cannot be converted as asked; the message names the thing and the remedy."""


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
    shown_as: str | None = None,
) -> None:
    """Write the checkpoint at `source` (Ouro format, safetensors) to `target` as a MELT with a fresh gate.

    The gate starts at the reference model's values in the source's dtype, and is
    the same for the same seed however the source is sharded. `target` appears whole or not at all.

    Args:
        source: the checkpoint's folder.
        target: the folder to write, which does not exist or is empty.
        max_loops: the most loops a request may ask for, by default the source's `total_ut_steps`.
        shown_as: what the card calls the source, by default as its folder.

    Raises:
        CheckpointError: the source is not a whole, finite Ouro-format checkpoint.
        ConversionError: the target is taken, the options do not fit, or the disk is too small.
        OSError: the disk fails on the way.
    """
    source, target = source.resolve(), target.resolve()
    check_folders(source, target)
    fields, looplm, shards = read_looplm(source)
    shapes = dict(weight_shapes(looplm))
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
        if max_loops is not None and max_loops > looplm.total_ut_steps:  # how it answers beyond is not known
            melt_fields["effort_loops"] = dict.fromkeys(DEEP_EFFORTS, looplm.total_ut_steps)
        melt = MeltConfig(**melt_fields)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ConversionError(
            f"{source / 'config.json'} and the options do not fit: {error.__cause__ or error}"
        ) from error
    dtypes = {key: dtype for shard in shards for key, dtype in shard.dtypes.items()}
    gate = {key: shape for key, shape in weight_shapes(melt) if key not in shapes}
    gate_dtype = dtypes["model.embed_tokens.weight"]
    gate_parts = split_gate(gate, gate_dtype)
    source_bytes = sum(math.prod(shapes[key]) * dtype.itemsize for key, dtype in dtypes.items())
    total_bytes = source_bytes + sum(map(math.prod, gate.values())) * gate_dtype.itemsize
    check_space(target, total_bytes)
    warn_about_blocks(chunk_size)
    tokenizer = tokenizer_of(source)

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
            tensors = {key: fresh(key, shape, melt, generator).to(gate_dtype) for key, shape in part.items()}
            save(tensors, folder / name)
            weight_map.update(dict.fromkeys(part, name))
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
        write_json(folder / "config.json", {**melt_fields, "max_loops": melt.max_loops})
        copy_the_rest(source, folder)
        if tokenizer is not None:
            note_end_marks(folder, tokenizer)
        (folder / "README.md").write_text(card(source, shown_as or source.name, melt, seed), encoding="utf-8")
        write_sums(folder)


def check_folders(source: Path, target: Path) -> None:
    """Refuse a target that cannot be written to, or would harm the source.

    Raises:
        ConversionError: it is one.
    """
    if target == source or source in target.parents:
        raise ConversionError(f"the target {target} lies in the source {source}; choose a folder outside it")
    if target.exists() and not target.is_dir():
        raise ConversionError(f"the target {target} is a file; choose a new folder")
    if target.exists() and any(target.iterdir()):
        raise ConversionError(f"the target {target} exists and is not empty; choose a new folder or empty it")


def split_gate(gate: Shapes, dtype: torch.dtype) -> list[Shapes]:
    """Split the gate's tensors into shards of at most GATE_SHARD_BYTES, or of one tensor that is larger."""
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


def fresh(key: str, shape: tuple[int, ...], config: MeltConfig, generator: torch.Generator) -> torch.Tensor:
    """Make a gate tensor as the reference model starts it."""
    if key.endswith(".bias"):
        return torch.full(shape, GATE_BIAS)
    return torch.empty(shape).normal_(std=fresh_weight_std(config), generator=generator)


def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file.

    Raises:
        OSError: the disk fails, which safetensors reports in its own way.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(mode)  # as of any new file; safetensors would keep it from all other users
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def check_space(target: Path, needed: int) -> None:
    """Refuse a disk that cannot hold the target.

    Raises:
        ConversionError: it cannot.
    """
    existing = next(parent for parent in target.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ConversionError(
            f"the target {target} needs {needed / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB free; "
            "free some, or choose another disk"
        )


def tokenizer_of(source: Path) -> PreTrainedTokenizerBase | None:
    """Return the checkpoint's tokenizer, or say that there is none: a server needs one.

    Its end marks are all that it is read for, so one that cannot be read is a warning, too.
    """
    if not any(source.glob("tokenizer*")):
        print(
            f"warning: {source} has no tokenizer; put the files of its tokenizer beside it before you serve the result",
            file=sys.stderr,
        )
        return None
    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers has errors of no other class
        reason = " ".join(str(error).split())[:200]
        print(
            f"warning: {source}: the tokenizer cannot be read, so its end marks are not noted: {reason}",
            file=sys.stderr,
        )
        return None


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
    """Yield a folder beside `target` that becomes it at the end, or vanishes: on errors, Ctrl-C and SIGTERM.

    Raises:
        ConversionError: another conversion writes there.
    """
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


def card(source: Path, name: str, config: MeltConfig, seed: int) -> str:
    """Write the model card of the converted checkpoint."""
    return f"""\
---
{licence_of(source)}library_name: melt_serve
---

# {name}, converted to MELT

Made by `melt-serve convert` from the LoopLM `{name}`: its weights unchanged, plus a fresh KV gate.

| | |
|---|---|
| gate | {config.kv_gate_type}, initial state: {config.kv_gate_initial_state}, seed {seed} |
| loops | {config.total_ut_steps} by default, at most {config.max_loops} |
| chunks | {config.chunk_size} tokens, decode mode: {config.decode_mode} |

The gate is untrained: post-train this checkpoint (arXiv 2605.07721) before judging its answers.
"""


def write_json(path: Path, content: object) -> None:
    """Write JSON as Hugging Face does: indented, with a line end."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
