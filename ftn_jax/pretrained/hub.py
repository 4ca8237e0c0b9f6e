"""Find pretrained files by their Hugging Face hub name."""

import os
import re
from pathlib import Path

SCHEME = "hf://"
DEFAULT_FILE = "model.safetensors"
_NAME = re.compile(
    r"hf://(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(/(?P<file>.+))?"
)


class HubFileNotFound(FileNotFoundError):
    """Say which hub file is neither in the cache nor within reach."""


def locate(source: str | os.PathLike[str]) -> Path:
    """Give the local path of a source, from the hub's cache or the hub if it is a name.

    The cache (set by HF_HOME or HF_HUB_CACHE) is asked first, so what was fetched once
    needs no network.

    Args:
        source: A path, which is returned as it is, or `hf://owner/repo`,
            `hf://owner/repo/file`, `hf://owner/repo@revision/file`; the file defaults
            to `model.safetensors`. Example: `hf://timm/resnet18.tv_in1k`.

    Raises:
        ValueError: If a `hf://` name has another form.
        HubFileNotFound: If the file is not in the cache and cannot be fetched.
        ImportError: If huggingface_hub is not installed.
    """
    name = os.fspath(source)
    if not name.startswith(SCHEME):
        return Path(name)
    parts = _NAME.fullmatch(name)
    if parts is None:
        raise ValueError(
            f"{name!r} is not a hub name: write hf://owner/repo, hf://owner/repo/file "
            "or hf://owner/repo@revision/file"
        )
    repo, revision = parts["repo"], parts["revision"] or "main"
    file = parts["file"] or DEFAULT_FILE
    try:
        from huggingface_hub import constants, hf_hub_download
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError as error:
        raise ImportError(
            f"{name}: hub names need huggingface_hub: pip install 'ftn_jax[hub]'"
        ) from error
    try:
        cached = hf_hub_download(repo, file, revision=revision, local_files_only=True)
        return Path(cached)
    except LocalEntryNotFoundError:
        pass  # not fetched yet
    try:
        return Path(hf_hub_download(repo, file, revision=revision))
    except Exception as error:  # the HTTP library below the hub differs by version
        raise HubFileNotFound(
            f"{name}: {file} is not in the cache {constants.HF_HUB_CACHE} and could "
            f"not be fetched ({type(error).__name__}). Fetch "
            f"https://huggingface.co/{repo}/resolve/{revision}/{file} where there is a "
            "network and give its local path as the source, or run `hf download "
            f"{repo} {file} --revision {revision}` there and copy the cache here"
        ) from error
