"""Whether a checkpoint can be served as it is: its config, weights, token ids, chat template and checksums.

What vLLM would refuse after half a minute and two hundred lines, or serve without a word, is one sentence here.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from melt_serve.chat_template import TemplateError, template_of, try_template
from melt_serve.checkpoint_config import (
    ARCHITECTURES,
    CONFIG_OF_GPTQ,
    MLX,
    config_of,
    quantization_of,
    read_fields,
    read_json,
    refuse_quantized,
)
from melt_serve.checkpoint_files import Shard, check_quantized, opened, read_headers, shard_paths, verify_values
from melt_serve.checkpoint_path import CheckpointError
from melt_serve.checksums import ChecksumError, verify_sums
from melt_serve.config import LoopLMConfig, MeltConfig, weight_shapes
from melt_serve.terminal import fail


@dataclass(frozen=True)
class Checked:
    """A checkpoint that was found right.

    Attributes:
        tensors: the number of its tensors.
        nbytes: the bytes of its weight files.
        compared: files whose checksums are right; None where the folder has no checksums.
    """

    model_type: str
    tensors: int
    nbytes: int
    compared: int | None


def check_checkpoint(
    folder: Path, whole: bool = True, show_progress: bool = False, chat_template: Path | None = None
) -> Checked | None:
    """Check a folder; return what it holds, or None where that is no model of ours, and nobody's to judge but vLLM's.

    Args:
        whole: look at every value and every file's checksum, not at headers and the weights' checksums alone.
        show_progress: of the values, as a bar.
        chat_template: a file that is used instead of the folder's template.

    Raises:
        CheckpointError: it cannot be served; the message names file, field and remedy.
    """
    fields = read_fields(folder)
    if fields.get("model_type") not in ARCHITECTURES:
        return None
    config = config_of(folder, fields)
    shapes = dict(weight_shapes(config))
    method = quantization_of(folder, fields)
    if method is not None:
        refuse_unserved(folder, method, fields)
        check_quantized(folder, shapes)
    shards = [] if method is not None else read_headers(folder, shapes)
    check_token_ids(folder, config.vocab_size)
    try:
        if template := template_of(folder, chat_template):
            try_template(*template)
        weights = {shard.name for shard in shard_paths(folder)}
        compared = verify_sums(folder, lambda name: whole or name in weights)
    except (TemplateError, ChecksumError) as error:
        raise CheckpointError(str(error)) from error
    nbytes = sum(shard.stat().st_size for shard in shard_paths(folder))
    if whole:
        with tqdm(total=nbytes, desc="check", unit="B", unit_scale=True, disable=not show_progress) as bar:
            for shard in shards:
                verify_values(shard, bar)
    return Checked(config.model_type, count_tensors(folder), nbytes, compared)


def refuse_unserved(folder: Path, method: str, fields: dict[str, object]) -> None:
    """Refuse a quantized checkpoint that vLLM does not serve.

    Raises:
        CheckpointError: it is one.
    """
    remedy = "name the unquantized one, or one in GPTQ's, AWQ's or compressed-tensors' format"
    if method == MLX:
        raise CheckpointError(f"{folder} is quantized by MLX, in a format that only MLX reads: {remedy}")
    if method == "bitsandbytes":
        raise CheckpointError(f"{folder} is quantized by bitsandbytes, which vLLM does not read: {remedy}")
    if (folder / CONFIG_OF_GPTQ).is_file() and "quantization_config" not in fields:
        raise CheckpointError(
            f"{folder} is quantized, and only {CONFIG_OF_GPTQ} says how: put its content into config.json as "
            'quantization_config, with "quant_method": "gptq"'
        )


def read_looplm(folder: Path) -> tuple[dict[str, object], LoopLMConfig, list[Shard]]:
    """Read what a MELT is made from: a LoopLM's fields and config, and its weights' headers.

    Raises:
        CheckpointError: it is no whole, unquantized LoopLM.
    """
    fields = read_fields(folder)
    if (model_type := fields.get("model_type")) == MeltConfig.model_type:
        raise CheckpointError(f"{folder} is a MELT checkpoint already; serve it, or name the LoopLM it came from")
    if model_type != LoopLMConfig.model_type:
        raise CheckpointError(f"{folder} is a {model_type!r} model; a MELT is made from a looped one alone ('ouro')")
    refuse_quantized(folder, fields)
    config = config_of(folder, fields)
    shards = read_headers(folder, dict(weight_shapes(config)))
    check_token_ids(folder, config.vocab_size)
    return fields, config, shards


def check_token_ids(folder: Path, vocabulary: int) -> None:
    """Refuse tokens that the model has no row for, in the tokenizer and in the generation defaults.

    Raises:
        CheckpointError: there is one, or one of the files is no JSON.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "tokenizer.json"):
        path = folder / name
        if not path.is_file():
            continue
        for what, token in ids_in(read_json(path)):
            if not 0 <= token < vocabulary:
                raise CheckpointError(
                    f"{path}: {what} has the id {token}, which is outside the vocabulary that config.json states, "
                    f"0..{vocabulary - 1}; the two must come from the same checkpoint"
                )


def ids_in(fields: dict[str, object]) -> Iterator[tuple[str, int]]:
    """Yield the token ids that a tokenizer's or a generation's file states, each with what has it."""
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        value = fields.get(name)
        yield from ((name, each) for each in (value if isinstance(value, list) else [value]) if isinstance(each, int))
    model = fields.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        yield from ((f"the token {token!r}", number) for token, number in vocabulary.items() if isinstance(number, int))
    elif isinstance(vocabulary, list):
        yield from ((f"the token {entry!r}", number) for number, entry in enumerate(vocabulary))
    added = fields.get("added_tokens")
    for entry in added if isinstance(added, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("id"), int):
            yield f"the token {entry.get('content')!r}", entry["id"]


def count_tensors(folder: Path) -> int:
    """Count the tensors in all weight files."""
    count = 0
    for path in shard_paths(folder):
        with opened(path, "np") as file:
            count += len(list(file.keys()))
    return count


def main(folder: str, *chat_template: str) -> int:
    """Check what a start needs to know, in a process of its own; return 2 where the checkpoint cannot be served."""
    try:
        check_checkpoint(Path(folder), whole=False, chat_template=Path(*chat_template) if chat_template else None)
    except (CheckpointError, OSError) as error:
        fail(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
