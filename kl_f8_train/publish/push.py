"""Uploads an export to the Hugging Face hub: its own files, in one commit, after a dry run.

Pictures are never uploaded unless asked for: they are made of somebody's photographs.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from kl_f8_train.errors import MissingInputError, RunFailedError, UsageError
from kl_f8_train.folders import SUFFIXES
from kl_f8_train.publish.card import README, check_files, read_record
from kl_f8_train.run_dir import EXPORT_FILE
from kl_f8_train.units import counted, size

REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass
class Upload:
    """What a push would do: path in the repository -> file here, and what stays behind."""

    repository: str
    files: dict[str, Path]
    left_out: list[str] = field(default_factory=list)
    readme: str | None = None  # in place of the file's text, if pictures were taken out of it
    warnings: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The plan, for people."""
        sizes = {name: path.stat().st_size for name, path in self.files.items()}
        return [
            f"to https://huggingface.co/{self.repository}, {size(sum(sizes.values()))}:",
            *(f"  {name}  {size(count)}" for name, count in sizes.items()),
            *(f"  not uploaded: {what}" for what in self.left_out),
            *(f"WARNING: {warning}" for warning in self.warnings),
        ]


def plan_upload(export_dir: Path, repository: str, pictures: bool = False) -> Upload:
    """Which files of an export go to the hub; uses no network.

    Raises UsageError for a malformed repository name, MissingInputError if the directory is not
    an export, or if a file is not the one that was exported.
    """
    if not REPOSITORY.fullmatch(repository):
        raise UsageError(f"{repository}: expected OWNER/NAME, as on the hub")
    record = read_record(export_dir)
    upload = Upload(repository, {})
    check_files(export_dir, record)
    for name in record["files"]:
        path = export_dir / name
        if path.suffix.lower() in SUFFIXES and not pictures:
            upload.left_out.append(f"{name} (made of photographs; --pictures uploads it)")
        else:
            upload.files[name] = path
    upload.files = dict(sorted(upload.files.items()))
    if upload.left_out and README in upload.files:
        upload.readme = without_pictures(upload.files[README].read_text(encoding="utf-8"))
    for path in sorted(export_dir.iterdir()):
        if path.is_file() and path.name not in (EXPORT_FILE, *record["files"]):
            upload.left_out.append(f"{path.name} (not written by export or card)")
    if not record.get("card", {}).get("license"):
        upload.warnings.append(
            f"the card states no license: kl-f8-train card {export_dir} --license ID"
        )
    return upload


def push(upload: Upload, private: bool, say: Callable[[str], None]) -> str:
    """Makes the repository if it is not there, and uploads in one commit; returns its address.

    Raises MissingInputError without huggingface_hub, RunFailedError if the hub refuses.
    """
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise MissingInputError("push needs: pip install 'kl-f8-train[hub]'") from error
    try:
        api = hub.HfApi()
        api.create_repo(upload.repository, private=private, exist_ok=True)
        # In one commit: the repository has all of the export or nothing of it.
        contents: dict[str, str | bytes] = {name: str(p) for name, p in upload.files.items()}
        if upload.readme is not None:
            contents[README] = upload.readme.encode()
        operations = [hub.CommitOperationAdd(name, content) for name, content in contents.items()]
        say(f"uploading {counted(len(operations), 'file', 's')} ...")
        commit = api.create_commit(
            upload.repository, operations, commit_message="Upload a kl-f8 decoder (kl_f8_train)"
        )
    except Exception as error:  # of whichever library the hub's client uses
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise RunFailedError(
            f"the hub did not take it: {reason}\nNothing was committed. Log in once with `hf auth "
            "login`, or give HF_TOKEN a token that may write there; then run the same command again"
        ) from error
    return str(commit.commit_url)


def without_pictures(card: str) -> str:
    """A card without the images that are not uploaded with it."""
    return re.sub(r"^!\[[^\n]*\]\([^)\n]+\)\n+", "", card, flags=re.MULTILINE)
