"""Upload exported folders to the Hugging Face hub, with its own client."""

from pathlib import Path
from typing import Any

from mimref.errors import ConfigError, OutputError
from mimref.sharing.layout import CARD, CONFIG, WEIGHTS

# HTTP libraries that versions of the hub's client use to reach servers.
_CLIENTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")


def is_export(folder: Path) -> bool:
    """Return whether a folder holds what `mimref export --to hf` writes."""
    return all((folder / name).is_file() for name in (CARD, CONFIG, WEIGHTS))


def check_name(name: str) -> None:
    """Raise ConfigError for a name that a repository cannot have."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id  # slow

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"{name}: not a repository name, such as OWNER/NAME ({_one_line(error)})") from error


def check_access() -> None:
    """Raise ConfigError if uploads are switched off or no token for the hub is set."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise ConfigError("HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it")
    token = get_token()
    if token and not (token.isascii() and token.isprintable()):  # it goes into a header
        raise ConfigError("the token for the Hugging Face hub has characters that no token has; copy it again")
    if not token:
        raise ConfigError(
            "no token for the Hugging Face hub: set HF_TOKEN to one with write access, or log in with `hf auth login`"
        )


def push_folder(
    folder: Path, name: str, *, private: bool = False, message: str | None = None, force: bool = False
) -> str:
    """Create a model repository, and upload all files of a folder in one commit. Returns its address.

    name: OWNER/NAME, or NAME in the user's own account. private: make a new repository private; otherwise its owner's
    default applies. message: of the commit. force: commit to an existing repository. The server is the hub, or
    `$HF_ENDPOINT`; the token is `$HF_TOKEN`, or the saved one, and is never part of a message. Raises ConfigError
    without a token or for a wrong name, OutputError when the server refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    check_name(name)
    check_access()
    api = HfApi()
    created = False
    try:
        repository = api.create_repo(name, private=private or None, exist_ok=force).repo_id
        created = True
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message or "Upload from mimref")
    except Exception as error:  # from the client, or from whichever HTTP library it uses
        wrong = _refusal(name, str(api.endpoint), error, created)
        if wrong is None:
            raise
        raise OutputError(_without_token(wrong)) from None  # the chain holds requests with their headers
    return f"{api.endpoint}/{repository}"


def _refusal(name: str, endpoint: str, error: Exception, created: bool) -> str | None:
    """Return what went wrong and what to do; None for errors unrelated to the server."""
    from huggingface_hub.utils import HfHubHTTPError

    response: Any = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status is None or not isinstance(error, HfHubHTTPError):
        if type(error).__module__.partition(".")[0] in _CLIENTS or isinstance(error, OSError):
            return (
                f"{name}: the connection to {endpoint} failed ({_one_line(error)}); check the network, and HF_ENDPOINT"
            )
        return None
    said = " ".join(str(getattr(error, "server_message", None) or "").split())
    said = f" ({said})" if said else ""
    if status == 401:
        return f"{name}: {endpoint} does not accept the token{said}; set HF_TOKEN to a valid one"
    if status == 403:
        return f"{name}: the token may not write there{said}; use a token with write access, or a name of your own"
    if status == 409 and not created:
        return f"{name}: exists; choose another name, or --force to replace its files"
    if status == 404:
        return f"{name}: {endpoint} has no such owner or repository{said}; check the name"
    return f"{name}: {endpoint} refuses with status {status}{said or f' ({_one_line(error)})'}; try again later"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _without_token(text: str) -> str:
    from huggingface_hub import get_token

    token = get_token()
    return text.replace(token, "hf_...") if token else text
