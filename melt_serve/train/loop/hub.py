"""A checkpoint on Hugging Face's hub."""

from pathlib import Path

from melt_serve.train.session import TrainingError


def push(folder: Path, name: str) -> str:
    """Upload a checkpoint's folder as a model; one that is not there is made, private. Return its address.

    The hub's library reads HF_TOKEN and HF_ENDPOINT.

    Args:
        name: OWNER/NAME.

    Raises:
        TrainingError: it cannot be uploaded; the folder stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    hub = HfApi()
    try:
        repository = hub.create_repo(name, private=True, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder, commit_message=f"Upload {folder.name}")
    except HFValidationError as error:
        raise TrainingError(f"--push {name}: name it OWNER/NAME; the checkpoint is in {folder}") from error
    except Exception as error:  # of the network's many
        reason = " ".join(str(error).split())[:300]
        raise TrainingError(
            f"--push {name}: {hub.endpoint} does not take it ({reason}); it needs a token that may write (HF_TOKEN). "
            f"The checkpoint is in {folder}"
        ) from error
    return str(repository)
