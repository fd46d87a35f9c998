"""Whether a checkpoint can be served as it is: its config, weights, token ids, chat template and checksums.

What vLLM would refuse after half a minute and two hundred lines, or serve without a word, is one sentence here.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from tqdm import tqdm

from melt_serve.chat_template import TemplateError, template_of, try_template
from melt_serve.checkpoint_files import (
    CheckpointError,
    check_quantized,
    opened,
    read_headers,
    read_json,
    shard_paths,
    verify_values,
)
from melt_serve.checksums import ChecksumError, verify_sums
from melt_serve.config import LoopLMConfig, MeltConfig, weight_shapes
from melt_serve.terminal import fail

ARCHITECTURES: dict[str, tuple[type[LoopLMConfig], str]] = {
    LoopLMConfig.model_type: (LoopLMConfig, "OuroForCausalLM"),
    MeltConfig.model_type: (MeltConfig, "MeltForCausalLM"),
}
"""A checkpoint's `model_type`, the class of its config, and the architecture that serves it."""


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
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json; name the folder of a checkpoint")
    fields = read_json(path)
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        return None
    config = config_of(path, fields)
    shapes = dict(weight_shapes(config))
    quantized = fields.get("quantization_config") is not None or (folder / "hf_quant_config.json").is_file()
    if quantized:
        check_quantized(folder, shapes)
    shards = [] if quantized else read_headers(folder, shapes)
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
    return Checked(model_type, count_tensors(folder), nbytes, compared)


def config_of(path: Path, fields: dict[str, object]) -> LoopLMConfig:
    """Return the config that the fields of a `config.json` make.

    Raises:
        CheckpointError: they make none, or another model than `model_type` says.
    """
    kind, architecture = ARCHITECTURES[str(fields["model_type"])]
    stated = fields.get("architectures")
    if stated is not None and stated != [architecture]:
        raise CheckpointError(
            f"{path} says architectures={stated}, but a model of model_type={kind.model_type!r} is [{architecture!r}]; "
            "correct one of the two"
        )
    try:
        return kind(**fields)
    except (StrictDataclassError, TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as error:
        raise CheckpointError(f"{path} cannot be used: {error.__cause__ or error}") from error


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
