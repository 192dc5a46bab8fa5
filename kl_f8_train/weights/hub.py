"""Weights named by a Hugging Face hub id: the cached file, or the downloaded one."""

import re
from pathlib import Path

from kl_f8_train import shipped
from kl_f8_train.errors import MissingInputError, like_path

FILES = tuple(
    f"{folder}diffusion_pytorch_model.{suffix}"
    for folder in ("", "vae/", "diffusers/")
    for suffix in (
        *("safetensors", "safetensors.index.json", "bin", "bin.index.json"),
        *("fp16.safetensors", "fp16.bin", "safetensors.index.fp16.json"),
    )
)
WEIGHT_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors", ".zip")
SECONDS = 5.0  # for the hub's first answer; its own retries would take 23


def is_id(text: str) -> bool:
    """Whether `text` looks like `stabilityai/sd-vae-ft-mse`, and not like a file or a run here."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text) or text.endswith(WEIGHT_SUFFIXES):
        return False
    return not Path(text).parent.is_dir()


def check_exists(weights: str, key: str = "") -> None:
    """Raises MissingInputError for weights that are neither here nor named as on the hub."""
    here = weights == shipped.BASE_NAME or Path(weights).exists()
    if not here and not is_id(weights):
        raise MissingInputError(
            f"{key}{weights}: no such file; expected a weight file, a diffusers folder, a run "
            f"directory or a hub id OWNER/NAME{like_path(weights, [shipped.BASE_NAME])}"
        )


def fetch(repo: str) -> Path:
    """The autoencoder's file of a hub repository, from the cache where it is there.

    Raises MissingInputError without huggingface_hub, without an answer, or without such a file.
    """
    where = f"{repo}: no such file or folder here, and as a hub id"
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise MissingInputError(
            f"{where} it needs huggingface_hub: pip install huggingface_hub"
        ) from error
    for name in FILES:
        cached = hub.try_to_load_from_cache(repo, name)
        if isinstance(cached, str):
            return Path(cached)
    try:
        siblings = hub.HfApi().model_info(repo, timeout=SECONDS).siblings or []
        names = {sibling.rfilename for sibling in siblings}
        chosen = next((name for name in FILES if name in names), None)
        if chosen:
            for name in sorted(_beside(chosen, names)):
                hub.hf_hub_download(repo, name)
            return Path(hub.hf_hub_download(repo, chosen))
    except Exception as error:  # its class depends on the versions of several libraries
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise MissingInputError(
            f"{where} there is no answer: {reason}\nDownload its {FILES[0]} yourself and "
            "give its path"
        ) from error
    raise MissingInputError(f"{where} it holds no {FILES[0]}, nor one in vae/")


def _beside(chosen: str, names: set[str]) -> set[str]:
    """What a file needs beside it: its config.json; and of an index the files that hold weights."""
    needed = {str(Path(chosen).with_name("config.json"))} & names
    if index := re.fullmatch(r"(.*)\.\w+\.index(\.\w+)?\.json", chosen):
        stem = f"{index[1]}{index[2] or ''}-0"
        needed |= {name for name in names if name.startswith(stem)}
    return needed
