"""What a path that was named as a checkpoint holds, and a looped model's config: where all that read one begin."""

import json
import sys
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from melt_serve.checkpoint_path import CONFIG, CheckpointError, located
from melt_serve.config import LoopLMConfig, MeltConfig

ARCHITECTURES: dict[str, tuple[type[LoopLMConfig], str]] = {
    LoopLMConfig.model_type: (LoopLMConfig, "OuroForCausalLM"),
    MeltConfig.model_type: (MeltConfig, "MeltForCausalLM"),
}
"""A checkpoint's `model_type`, the class of its config, and the architecture that serves it."""
MLX = "MLX"
CONFIG_OF_GPTQ = "quantize_config.json"
"""Where older tools wrote their settings, and not into `config.json`."""


def located_looped(named: str) -> Path:
    """Return the folder of a looped model's checkpoint, see `located`; of any other on the hub, the config alone comes.

    Raises:
        CheckpointError: it cannot be fetched, or the hub has another model under that name.
    """
    folder = located(named, CONFIG)
    if folder == Path(named):
        return folder
    if (model_type := read_fields(folder).get("model_type")) not in ARCHITECTURES:
        raise CheckpointError(f"{named} is a {model_type!r} model, not a looped one ('ouro' or 'melt')")
    return located(named)


def load_config(checkpoint: Path) -> LoopLMConfig:
    """Read the config of a LoopLM or MELT: a folder's, or a `config.json`.

    Raises:
        CheckpointError: there is none, it is another model's, or it states what is not supported.
    """
    fields = read_fields(checkpoint)
    if (model_type := fields.get("model_type")) not in ARCHITECTURES:
        raise CheckpointError(f"{checkpoint} is a {model_type!r} model, not a looped one ('ouro' or 'melt')")
    return config_of(checkpoint, fields)


def read_fields(checkpoint: Path) -> dict[str, object]:
    """Read the fields of a checkpoint's `config.json`, whatever model it is.

    Args:
        checkpoint: a folder, or that file.

    Raises:
        CheckpointError: there is none; the message says what there is instead.
    """
    if checkpoint.is_file() and checkpoint.suffix == ".json":
        return read_json(checkpoint)
    if checkpoint.suffix == ".gguf" or (checkpoint.is_dir() and not config_file(checkpoint) and holds_gguf(checkpoint)):
        raise CheckpointError(
            f"{checkpoint} is in llama.cpp's format (GGUF), which has no looped models: name the folder of the "
            "safetensors checkpoint that it was made from"
        )
    if not checkpoint.exists():
        raise CheckpointError(f"{checkpoint} does not exist; name the folder of a checkpoint")
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint} is not a folder; name the folder of a checkpoint")
    refuse_adapter(checkpoint)
    if not config_file(checkpoint):
        raise CheckpointError(f"{checkpoint} has no config.json; name the folder of a checkpoint")
    return read_json(checkpoint / "config.json")


def config_file(folder: Path) -> bool:
    """Return whether a folder has a `config.json`."""
    return (folder / "config.json").is_file()


def holds_gguf(folder: Path) -> bool:
    """Return whether a folder has a file of llama.cpp's."""
    return any(folder.glob("*.gguf"))


def refuse_adapter(folder: Path) -> None:
    """Refuse a folder that holds an adapter and no model.

    Raises:
        CheckpointError: it does; the message names the model that it belongs to.
    """
    path = folder / "adapter_config.json"
    if not path.is_file() or any(folder.glob("model*.safetensors")):
        return
    base = read_json(path).get("base_model_name_or_path") or "its base model"
    raise CheckpointError(
        f"{folder} is an adapter (PEFT) of {base}, not a model: serve that with --enable-lora --lora-modules "
        f"{folder.resolve().name}={folder}, or merge the two (merge_and_unload) and name the result"
    )


def quantization_of(folder: Path, fields: dict[str, object]) -> str | None:
    """Return the method by which a checkpoint's weights are quantized; None where they are not."""
    stated = fields.get("quantization_config")
    if isinstance(stated, dict) and stated.get("quant_method"):
        return str(stated["quant_method"])
    if isinstance(fields.get("quantization"), dict):  # which names no method
        return MLX
    if stated is not None or (folder / "hf_quant_config.json").is_file():
        return "modelopt"
    return "gptq" if (folder / CONFIG_OF_GPTQ).is_file() else None


def refuse_quantized(folder: Path, fields: dict[str, object]) -> None:
    """Refuse a quantized checkpoint, where the weights themselves are wanted.

    Raises:
        CheckpointError: it is one.
    """
    if method := quantization_of(folder, fields):
        raise CheckpointError(
            f"{folder} is quantized ({method}), and only a server reads that; name the unquantized one"
        )


def config_of(checkpoint: Path, fields: dict[str, object]) -> LoopLMConfig:
    """Return the config that the fields of a looped model's `config.json` make. A guess is told on stderr.

    Raises:
        CheckpointError: they make none, or another model than `model_type` says.
    """
    path = checkpoint / "config.json" if checkpoint.is_dir() else checkpoint
    kind, architecture = ARCHITECTURES[str(fields["model_type"])]
    stated = fields.get("architectures")
    if stated is not None and stated != [architecture]:
        raise CheckpointError(
            f"{path} says architectures={stated}, but a model of model_type={kind.model_type!r} is [{architecture!r}]; "
            "correct one of the two"
        )
    try:
        config = kind(**fields)
    except (StrictDataclassError, TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as error:
        raise CheckpointError(f"{path} cannot be used: {error.__cause__ or error}") from error
    places = (fields, fields.get("rope_parameters"), fields.get("rope_scaling"))
    if not any(isinstance(place, dict) and "rope_theta" in place for place in places):
        print(
            f"warning: {path} states no rope_theta: {config.rope_base:g} is taken; if answers are nonsense, add the "
            "one it was trained with (Ouro's own code takes 10000 where none is stated)",
            file=sys.stderr,
        )
    return config


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON file that holds an object.

    Raises:
        CheckpointError: it does not.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object; download it again")
    return content
