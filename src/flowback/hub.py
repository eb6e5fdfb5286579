"""The Hugging Face Hub: downloads, uploads, and one sentence for each way in which it refuses.

Where the Hub does not answer, its client repeats every request five times before it looks into its cache: a
minute for a name. :func:`quick` asks once, and then leaves the Hub alone.
"""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from flowback.errors import InputError, shorten

__all__ = ["REPOSITORY", "answers", "check_login", "download", "quick", "reason", "upload"]

REPOSITORY = re.compile(r"(?P<name>[\w-][\w.-]*/[\w.-]+?)(@(?P<revision>[\w.+/-]+))?")
"""``owner/name``, or ``owner/name@revision``."""
_PATIENCE = 3.0
"""Seconds that the Hub has for its first answer."""
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


def answers() -> bool:
    """Whether the Hub may be asked and answers, whatever it says."""
    from huggingface_hub import constants  # slow to import: only where the Hub is wanted
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    except Exception:  # many kinds, from two generations of the client and from the network
        return False
    return True


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """Within it, a Hub that does not answer counts as switched off: its client looks into its cache alone.

    For all threads, since the client's switch is one for the process.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = not answers()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def download(name: str, revision: str | None = None, patterns: Sequence[str] = ("*",)) -> Path:
    """The folder of a repository's files in the Hub's cache, brought up to date if the Hub answers.

    Args:
        name: ``owner/name``.
        revision: branch, tag or commit.
        patterns: which files.

    Raises:
        Exception: of many kinds, from the Hub, its client, the network and the disk; see :func:`reason`.
    """
    from huggingface_hub import snapshot_download

    with quick():
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))


def check_login() -> None:
    """Refuse, before the work, an upload that cannot be.

    Raises:
        InputError: the Hub does not answer, or does not know the user.
    """
    from huggingface_hub import HfApi, constants

    if not answers():
        raise InputError(f"The Hub ({constants.ENDPOINT}) does not answer; connect, and try again.")
    try:
        HfApi().whoami()
    except Exception:  # no token, or one that is no longer valid
        raise InputError(f"The Hub does not know you; {_LOGIN}.") from None


def upload(folder: Path, name: str, *, private: bool = False, revision: str | None = None) -> str:
    """Upload a folder's files as one commit; returns the repository's address.

    Args:
        folder: its files get the same names in the repository; files that are only there stay.
        name: ``owner/name``; made if there is none.
        private: whether a new repository is private.
        revision: an existing branch; None is the main one.

    Raises:
        InputError: not allowed, or the connection broke; nothing was changed then.
    """
    from huggingface_hub import HfApi, constants

    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=name, folder_path=folder, revision=revision, commit_message="Upload with flowback"
        )
    except Exception as error:  # as for a download
        raise InputError(f"{name} cannot be uploaded: {reason(error, name, revision)}.") from None
    return f"{constants.ENDPOINT}/{name}"


def reason(error: Exception, name: str, revision: str | None = None) -> str:
    """Why the Hub did not do what was asked, and what to do: a part of a sentence, without its full stop.

    Args:
        error: of huggingface_hub, or of what uses it.
        name: the repository, or what the user named.
        revision: branch, tag or commit that was asked for.
    """
    from huggingface_hub import constants, errors

    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(isinstance(each, errors.GatedRepoError) for each in chain):
        return f"it is gated: accept its terms at {constants.ENDPOINT}/{name}, and {_LOGIN}"
    if any(isinstance(each, errors.RevisionNotFoundError) for each in chain):
        return f"the repository has no revision {revision}; give a branch, a tag or a commit of it"
    statuses = {status for each in chain if (status := _status(each)) is not None}
    if 403 in statuses:
        return f"you may not do that there; {_LOGIN} as somebody who may"
    if any(isinstance(each, errors.RepositoryNotFoundError) for each in chain) or 401 in statuses:
        return f"the Hub has no such repository, or it is private; check the name, or {_LOGIN}"
    if any(isinstance(each, errors.EntryNotFoundError) for each in chain if _status(each) is not None):
        return "the repository has no such file"
    if statuses:
        return f"the Hub answers with the status {max(statuses)}; try again later"
    full = next((each for each in chain if getattr(each, "errno", None) in _DISK), None)
    if full is not None:
        return f"the Hub's cache {constants.HF_HUB_CACHE} cannot be written ({shorten(str(full))})"
    if any(type(each).__name__ == "IncompleteSnapshotError" for each in chain):  # not in older clients
        return "its copy in the cache is incomplete, and the Hub does not answer; connect, and try again"
    offline = (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)
    named = "LocalEntryNotFoundError" in str(error)  # all that `datasets` leaves of it
    if named or any(isinstance(each, offline) for each in chain):
        silent = "is switched off (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "does not answer"
        return f"the Hub {silent}, nor has its cache a copy; connect, and try again"
    kinds = {each.__name__ for kind in chain for each in type(kind).__mro__}
    if kinds & {"TransportError", "ConnectionError", "ConnectTimeout", "Timeout"} or "Consistency" in str(
        error
    ):
        return f"the connection broke off ({shorten(str(error)) or type(error).__name__}); try again"
    return shorten(str(error), 200).rstrip(".") or type(error).__name__


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error of the client carries."""
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None)
