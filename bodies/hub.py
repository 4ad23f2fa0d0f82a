"""Where bodies are on a hub, whether it can be reached, and which commit of a body was loaded."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tasks import download

SIZES = {  # bytes to download
    "FacebookAI/roberta-base": 0.50e9,
    "google-bert/bert-base-uncased": 0.44e9,
    "timm/swin_base_patch4_window7_224.ms_in22k": 0.44e9,
}
OWNERS = {  # by the first word of the names that once had no owner
    "bert": "google-bert",
    "camembert": "almanach",
    "distilbert": "distilbert",
    "roberta": "FacebookAI",
    "xlm": "FacebookAI",
}


@contextlib.contextmanager
def connection() -> Iterator[str]:
    """Let the libraries ask the hub if it can be reached, and else use only their caches.

    Left alone, they would try again for up to a minute. Yields why it cannot be reached, or "".
    """
    from huggingface_hub import constants

    before, problem = constants.HF_HUB_OFFLINE, ""
    if before:
        problem = "HF_HUB_OFFLINE is set"
    elif constants.ENDPOINT.startswith("https://"):  # else it is a mirror nearby
        try:
            download.reach(constants.ENDPOINT)
        except download.Unavailable as error:
            problem = str(error)
    constants.HF_HUB_OFFLINE = before or bool(problem)
    try:
        yield problem
    finally:
        constants.HF_HUB_OFFLINE = before


def full_name(name: str) -> str:
    """OWNER/NAME of a body, for a name such as bert-base-uncased too; else the name as it is."""
    owner = OWNERS.get(name.split("-")[0])
    return f"{owner}/{name}" if owner and "-" in name and "/" not in name else name


def address(name: str) -> tuple[str, str | None]:
    """The repository that holds a body, timm's own by default; the revision asked for, if any."""
    repository, _, revision = name.partition("@")
    return repository if "/" in repository else f"timm/{repository}", revision or None


def commit(repository: str, revision: str | None = None) -> str | None:
    """The commit of a repository's files that were loaded; None if there are none in the cache."""
    from huggingface_hub import try_to_load_from_cache

    for name in ("config.json", "model.safetensors", "pytorch_model.bin"):
        path = try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(path, str):
            return Path(path).parent.name  # a folder of the cache is named after its commit
    return None
