"""Where a checkpoint lies that somebody named: a folder here, or a name on Hugging Face's hub, which is fetched."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from melt_serve.checksums import sum_of

NAME = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?")
"""`OWNER/NAME` or `OWNER/NAME@REVISION`; what begins with a dot or a slash is a path."""
CONFIG = ("config.json", "adapter_config.json")
"""What tells whose a checkpoint is."""
WHOLE = (
    "*.json",
    "*.safetensors",
    "*.jinja",
    "*.model",
    "additional_chat_templates/*",
    "merges.txt",
    "vocab.*",
    "SHA256SUMS",
    "README.md",
    "LICENSE*",
    "NOTICE*",
)
"""All that serving, converting or training reads: no code, no pickled weights, no other formats."""


class CheckpointError(ValueError):
    """A checkpoint is not whole, not what its config says, or none of ours; the message names thing and remedy."""


def located(named: str, files: Sequence[str] = WHOLE, revision: str | None = None) -> Path:
    """Return the folder of a checkpoint; what is named on the hub is fetched into the hub's cache, if it is not there.

    The hub's library reads HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE. Without a network, the cache is taken.

    Args:
        named: a path, or a name on the hub; a path that exists comes first.
        files: patterns of those that are needed.
        revision: of the hub's, where the name does not say it.

    Raises:
        CheckpointError: it cannot be fetched; the message says why.
    """
    name = None if is_there(named) else NAME.fullmatch(named)
    if name is None:
        return Path(named)
    return fetched(name["repository"], files, name["revision"] or revision)


def is_there(named: str) -> bool:
    """Return whether there is such a path.

    Raises:
        CheckpointError: the file system takes no such name, as of one that is too long.
    """
    try:
        return Path(named).exists()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{named} is no path ({reason}); name the folder of a checkpoint") from error


def shown_name(named: str) -> str:
    """Return what a model card calls a checkpoint: the last part of its path, or all of a name on the hub."""
    return Path(named).resolve().name if is_there(named) else named


def revision_of(folder: Path) -> str:
    """Return what tells versions of a checkpoint apart: its commit on the hub, or a hash of its config and weights."""
    if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
        return folder.name
    names = sorted(["config.json", *(path.name for path in folder.glob("*.safetensors"))])
    return hashlib.sha256("".join(f"{sum_of(folder / name)}  {name}\n" for name in names).encode()).hexdigest()


def fetched(repository: str, files: Sequence[str], revision: str | None) -> Path:
    """Return the folder in the hub's cache that holds files of a repository.

    Raises:
        CheckpointError: they cannot be fetched.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hub, silent = constants.ENDPOINT, are_progress_bars_disabled()
    if files == CONFIG:
        disable_progress_bars()
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(files)))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repository} is gated: accept its terms at {hub}/{repository}, and set HF_TOKEN to a token of yours"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repository} is neither a folder here nor a model at {hub} that this user may read; a private one needs "
            "a token (HF_TOKEN)"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{repository} has no revision {revision!r} at {hub}") from error
    except LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else f"{hub} cannot be reached"
        raise CheckpointError(
            f"{repository} is no folder here, {why}, and the cache in {constants.HF_HUB_CACHE} does not have all of it"
        ) from error
    except HFValidationError as error:
        raise CheckpointError(f"{repository} does not exist; name the folder of a checkpoint") from error
    except Exception as error:  # of the network's and the disk's many
        raise CheckpointError(f"{repository} cannot be fetched from {hub}: {error}") from error
    finally:
        if not silent:
            enable_progress_bars()
