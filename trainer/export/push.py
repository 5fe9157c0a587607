"""An exported folder becomes a repository of models on the hub, or a new commit in one."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, constants, get_token

from trainer.tracking.redact import redact_text

# Weights of an older export would be loaded in place of those that now have another name.
_REPLACED = ["*.safetensors", "*.safetensors.index.json", "onnx/*"]


def refuse_unready(repo: str) -> None:
    """Before any work is done, and without the network.

    Raises:
        ValueError: the hub's client is told to stay offline, or there is no token.
    """
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"--push {repo}: HF_HUB_OFFLINE is set, so nothing is sent; unset it where there is a network")
    if get_token() is None:
        raise ValueError(
            f"--push {repo}: there is no token of the hub; hf auth login, or set HF_TOKEN to one that writes"
        )


def push(folder: Path, repo: str, message: str, private: bool = False) -> str:
    """Upload a folder; $HF_ENDPOINT names another hub than huggingface.co.

    Files that others have put into the repository stay, older weights and graphs go.

    Args:
        repo: owner/name; it is made where there is none.
        message: of the commit.
        private: make it so; one that is there must be.

    Returns:
        The address of the commit.

    Raises:
        ValueError: the hub refuses it or can't be reached, or the repository is public and ``private`` was asked for.
    """
    api = HfApi(library_name="siamese-trainer")
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise ValueError(
                f"--private: {repo} is there and public, so nothing was sent; make it private in its settings, give "
                "another name, or leave --private out"
            )
        done = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message, delete_patterns=_REPLACED)
    except ValueError:  # ours, or the client's about the card
        raise
    except Exception as error:  # the client's, and those of two generations of the library below it
        status = getattr(getattr(error, "response", None), "status_code", None)
        cause = redact_text(" ".join(str(error).split()))[:200]
        remedy = f"{folder} is whole: the same command tries again"
        if status in (401, 403):
            remedy = "the token must be allowed to write there (hf auth whoami names its owner)"
        what = f"answered {status}" if status else f"can't be reached or does not take it: {type(error).__name__}"
        raise ValueError(f"--push {repo}: {api.endpoint} {what}: {cause}; {remedy}") from error
    return str(done.commit_url)
