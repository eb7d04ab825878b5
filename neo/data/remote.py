"""Asking object stores through fsspec: patient with one that does not answer, clear about what is missing."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from neo import extras
from neo.errors import InputError, NeoError

T = TypeVar("T")
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)  # ours: seconds before each further attempt; s3fs and gcsfs try several times in each
PATIENCE = 120.0  # ours: no further attempt after so many seconds, as one of gcsfs alone may take 30 to 50
AT_ONCE = 32  # ours: requests under way at a time, for opening and for the rows of a batch; one takes some 50 ms
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
CREDENTIALS = {
    "s3fs": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, write ~/.aws/credentials, or give the machine a role that "
            "may read it",
    "gcsfs": "run `gcloud auth application-default login`, set GOOGLE_APPLICATION_CREDENTIALS, or give the machine a service "
             "account that may read it",
}
# Errors of boto and of Google's libraries that say so; their classes cannot be named without importing them.
WITHOUT_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "NoAuthTokenError",
                       "SSOTokenLoadError", "UnauthorizedSSOTokenError", "DefaultCredentialsError"}
CLIENTS = {"botocore", "aiobotocore", "boto3", "aiohttp", "gcsfs", "google", "s3fs", "urllib3", "asyncio"}
PERMANENT = {errno.EINVAL, errno.EPERM, errno.ENAMETOOLONG}  # what s3fs makes of requests that are wrong in themselves

_file_systems: dict[str, Any] = {}
_opening = threading.Lock()


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of `url`, and the path within it.

    Raises InputError, with the cure, where its package is missing or nothing is known of this kind of address.
    """
    import fsspec

    protocol, _, rest = url.partition("://")
    # fsspec makes one client per thread; thirty of them would cost seconds and every one its own connections.
    key = f"{protocol}://{rest.partition('/')[0]}"
    try:
        with _opening:
            fs = _file_systems.get(key)
            if fs is None or "::" in url:
                fs, path = fsspec.core.url_to_fs(url)
                _file_systems[key] = fs
                return fs, path
        return fs, fs._strip_protocol(url)
    except ImportError as error:
        if protocol in PACKAGES:
            extras.need(PACKAGES[protocol], extra="cloud", why=f"{url}: reading {protocol}:// addresses")
        raise InputError(f"{url}: this kind of address needs one more package: {error}") from error
    except ValueError as error:
        raise InputError(f"{url}: {error}") from error


def forget() -> None:
    """Drop the clients kept by `file_system`, for tests that change where an address leads."""
    _file_systems.clear()


def ask(url: str, action: Callable[[Any, str], T], failure: type[NeoError] = InputError) -> T:
    """`action(file system, path)` of the address, again after a while where the store does not answer.

    Raises FileNotFoundError as it comes; InputError where the store refuses (credentials, wrong request) or a package is
    missing; `failure`, naming the address, where it does not answer: InputError while a run is opened, since the address
    may be wrong; RestartSafe once it has been read, since the store may come back.
    """
    began = time.monotonic()
    for wait in (*WAITS, None):
        try:
            return action(*file_system(url))
        except (NeoError, FileNotFoundError):
            raise
        except NotADirectoryError as error:
            raise FileNotFoundError(str(error)) from error
        except Exception as error:
            if not isinstance(error, OSError) and type(error).__module__.split(".")[0] not in CLIENTS:
                raise  # a bug, or not about the store
            if _refused(error):
                cure = CREDENTIALS.get(PACKAGES.get(url.partition("://")[0], ""), "check who may read it")
                raise InputError(f"{url}: the store refuses to be read ({_said(error)}): {cure}") from error
            if getattr(error, "errno", None) in PERMANENT:
                raise InputError(f"{url}: the store does not take the request ({_said(error)}); check the address") from error
            waited = time.monotonic() - began
            if wait is None or waited > PATIENCE:
                cure = ("; check the address and the network" if failure is InputError
                        else "; the same command goes on when it does")
                raise failure(f"{url}: the store does not answer, tried for {waited:.0f} s ({_said(error)}){cure}") from error
        time.sleep(wait)
    raise AssertionError("unreachable")


def _refused(error: Exception) -> bool:
    """Whether the store, or the client before it, says that we may not read."""
    return (isinstance(error, PermissionError) or type(error).__name__ in WITHOUT_CREDENTIALS
            or getattr(error, "code", None) in (401, 403) or str(error).startswith("Forbidden"))  # gcsfs


def _said(error: Exception) -> str:
    """What an error says, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."


@contextlib.contextmanager
def several(paths: Sequence[str]) -> Iterator[Callable[..., Iterable[Any]]]:
    """A `map` that asks for many things at a time if some of `paths` are addresses.

    Results, and the first error, come in order.
    """
    if not any("://" in path for path in paths):
        yield map
        return
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE, thread_name_prefix="neo-open") as pool:
        try:
            yield pool.map
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # what failed ends it; do not ask for the others
            raise


def version(info: dict[str, Any]) -> str | None:
    """What tells the present content of a file from an earlier one of the same name; None where the store says nothing.

    `info` is fsspec's; stores differ in what they tell, and listings in how they write it.
    """
    for field in ("ETag", "etag", "generation", "md5Hash", "mtime", "LastModified", "created", "Last-Modified"):
        if info.get(field):
            return f"{field.lower()} {str(info[field]).strip(chr(34))}"
    return None
