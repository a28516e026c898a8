"""Upload to a Hugging Face repository, by its own library and login."""

from __future__ import annotations

import re
from pathlib import Path

from job.errors import ConfigError, StorageError, StorageOutage, first_line

_REPOSITORY = re.compile(r"^[A-Za-z0-9][\w.\-]{0,95}/[A-Za-z0-9][\w.\-]{0,95}\Z", re.ASCII)


def require_repository_name(name: str) -> None:
    """Check the form of OWNER/NAME.

    Raises:
        ConfigError: it is another one.
    """
    if not _REPOSITORY.match(name) or "--" in name or ".." in name:
        raise ConfigError(f"--push takes a Hugging Face repository as OWNER/NAME, not {name!r}.")


def push(folder: Path, repository: str) -> str:
    """Create the repository, private, where there is none, and upload a folder in one commit.

    The token is that of ``hf auth login`` or of HF_TOKEN; this package neither reads nor prints it.

    Args:
        folder: local folder.
        repository: OWNER/NAME.

    Returns:
        URL of the commit.

    Raises:
        StorageError: the account may not write there.
        StorageOutage: the Hub does not answer.
    """
    import httpx
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi(library_name="job")
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        # One commit: upload_folder makes several where its transfer library is installed.
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        operations = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
        commit = api.create_commit(repository, operations, commit_message="Export by job")
        return str(commit.commit_url)
    except LocalTokenNotFoundError as error:
        raise StorageError(
            f"cannot push to {repository}: there is no login. Run hf auth login, or set HF_TOKEN."
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status >= 500 or status == 429:
            raise StorageOutage(f"cannot push to {repository}: the Hub answers {status}. Try again.") from error
        raise StorageError(
            f"cannot push to {repository}: the Hub answers {status}, {first_line(error, 200)}. Check that hf auth "
            "whoami names an account that may write there."
        ) from error
    except (httpx.HTTPError, OSError) as error:
        raise StorageOutage(f"cannot push to {repository}: {first_line(error, 200)}. Try again.") from error
