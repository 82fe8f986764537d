"""The boto3 client of a store, and its errors as messages to the person who has to fix them.

boto3 and botocore are imported inside the functions, so that importing the registry stays cheap.
"""

import contextlib
import logging
import os
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from components.shared.errors import Conflict, FineloopError, ObjectMissing, StoreError

# Counts requests and bytes of this process's S3 clients, including failed attempts.


@dataclass
class Traffic:
    """The counts. Bytes are those of bodies, without headers."""

    requests: int = 0
    read_bytes: int = 0
    written_bytes: int = 0


_so_far = Traffic()
_lock = threading.Lock()


def so_far() -> Traffic:
    """The traffic since the process began."""
    with _lock:
        return replace(_so_far)


def count(client: Any) -> None:
    """Count the requests of a client from now on."""
    client.meta.events.register("before-send.s3", _sent)
    client.meta.events.register("response-received.s3", _received)


def _sent(request: Any, **_: Any) -> None:
    with _lock:
        _so_far.requests += 1
        # If a checksum follows the body, the second header has the body's length.
        lengths = (request.headers.get(name) for name in ("Content-Length", "X-Amz-Decoded-Content-Length"))
        _so_far.written_bytes += int(next(filter(None, lengths), 0))


def _received(event_name: str, response_dict: Any = None, **_: Any) -> None:
    if event_name.endswith(".HeadObject"):  # its length is that of a body that is not sent
        return
    with _lock:
        _so_far.read_bytes += int(((response_dict or {}).get("headers") or {}).get("content-length") or 0)


logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 60
ATTEMPTS = 3
ATTEMPTS_WHERE_BUSY = 10  # with the pauses below, 75 to 150 seconds
BUSY_PAUSE_S = 4.0
LONGEST_PAUSE_S = 30.0
PART_BYTES = 16 * 2**20
TRANSFERS = 4  # parts of one file in flight; TRANSFERS * PART_BYTES bounds the memory of one transfer
MOST_PARTS = 10_000  # that S3 takes of one object
PROGRESS_FROM_BYTES = 64 * 2**20
WRONG_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"}
BAD_SESSION = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired"}


def client_from_environment() -> Any:
    """An S3 client with the endpoint, the region and the credentials that boto3 finds. Sends nothing to the store.

    Raises:
        StoreError: AWS_ENDPOINT_URL is not a URL, or AWS_PROFILE names no profile.
    """
    import boto3
    import botocore.session
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    _keep_botocore_quiet()
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    config = Config(
        signature_version="s3v4",
        # A self-hosted store seldom has a DNS name for each bucket.
        s3={"addressing_style": "path" if endpoint else "auto"},
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        max_pool_connections=64,
    )
    try:
        session = botocore.session.get_session()  # one of its own: the default one is not thread-safe
        session.register_component("data_loader", _service_models())
        client = boto3.session.Session(botocore_session=session).client("s3", config=config)
    except ValueError as exc:
        raise StoreError(
            f"AWS_ENDPOINT_URL is {endpoint!r}, which is not a URL: set it to http(s)://HOST[:PORT]"
        ) from exc
    except BotoCoreError as exc:
        raise StoreError(f"no S3 client can be made from the environment: {exc}") from exc
    client.meta.events.register("needs-retry.s3", _pause_where_away)
    count(client)
    return client


def _keep_botocore_quiet() -> None:
    """At INFO, which kfp's executor and Ray's workers show, it says of each client where it found credentials."""
    botocore = logging.getLogger("botocore")
    if botocore.level == logging.NOTSET:
        botocore.setLevel(logging.WARNING)


@cache
def _service_models() -> Any:
    """botocore's reader of its service descriptions, which keeps what it has read: a tenth of a second a client."""
    import botocore.session

    return botocore.session.get_session().get_component("data_loader")


def _pause_where_away(
    attempts: int, response: Any, caught_exception: Exception | None = None, **_: Any
) -> float | None:
    """Seconds until the next attempt at a store that is busy or away, when botocore's own attempts are spent.

    A store that sheds load or starts anew answers 503 for minutes. One that is not there is given up at once, but in a
    pod: network policies open a new pod's ways after its start, and a Service leads nowhere while its store moves.
    """
    from botocore.exceptions import ConnectTimeoutError, EndpointConnectionError

    is_busy = response is not None and response[0].status_code == 503
    is_away = isinstance(caught_exception, EndpointConnectionError | ConnectTimeoutError)
    in_pod = bool(os.environ.get("KUBERNETES_SERVICE_HOST"))
    if not (is_busy or (is_away and in_pod)) or not ATTEMPTS <= attempts < ATTEMPTS_WHERE_BUSY:
        return None
    if is_away and attempts == ATTEMPTS:
        logger.warning("the store cannot be reached, for which this pod may be too new: trying again for two minutes")
    return busy_pause_s(attempts)


def busy_pause_s(attempts: int) -> float:
    """Return how many seconds to wait after this many attempts, once the first few, with short waits, are spent."""
    return min(BUSY_PAUSE_S * 2 ** (attempts - ATTEMPTS), LONGEST_PAUSE_S) * random.uniform(0.5, 1)


def transfer_config() -> Any:
    """Concurrent parts for large files, with memory that does not grow with the file."""
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(
        multipart_threshold=2 * PART_BYTES,
        multipart_chunksize=PART_BYTES,
        max_concurrency=TRANSFERS,
        max_io_queue=TRANSFERS * 8,
    )


def create_from_file(client: Any, bucket: str, full_key: str, path: Path, *, content_type: str) -> str:
    """Upload a file unless the object exists, and return its etag; boto3's managed uploads know no condition.

    In parts, it is the completion that asks If-None-Match: until then there is no object.

    Raises:
        ClientError: with status 412, the object exists.
    """
    size = path.stat().st_size
    target = {"Bucket": bucket, "Key": full_key}
    checked: Any = {"ChecksumAlgorithm": "SHA256"}
    progress = TransferProgress(f"uploading {path.name}", size)
    if size < 2 * PART_BYTES:
        with path.open("rb") as body:
            answer = client.put_object(**target, **checked, Body=body, ContentType=content_type, IfNoneMatch="*")
        return str(answer["ETag"])
    part_bytes = max(PART_BYTES, -(-size // MOST_PARTS))
    upload = {
        **target,
        "UploadId": client.create_multipart_upload(**target, **checked, ContentType=content_type)["UploadId"],
    }

    def send(number: int) -> dict[str, Any]:
        with path.open("rb") as file:
            file.seek((number - 1) * part_bytes)
            body = file.read(part_bytes)
        answer = client.upload_part(**upload, **checked, PartNumber=number, Body=body)
        progress(len(body))
        return {"PartNumber": number, **{key: answer[key] for key in ("ETag", "ChecksumSHA256") if key in answer}}

    try:
        with ThreadPoolExecutor(TRANSFERS) as pool:
            parts = list(pool.map(send, range(1, -(-size // part_bytes) + 1)))
        answer = client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts}, IfNoneMatch="*")
    except BaseException:
        with contextlib.suppress(Exception):  # a lifecycle rule of the bucket removes what stays
            client.abort_multipart_upload(**upload)
        raise
    return str(answer["ETag"])


class TransferProgress:
    """Logs a large transfer at every tenth of it. Called by boto3 from several threads."""

    def __init__(self, what: str, total_bytes: int) -> None:
        self._what = what
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._lock = threading.Lock()

    def __call__(self, num_bytes: int) -> None:
        with self._lock:
            before, self._done_bytes = self._done_bytes, self._done_bytes + num_bytes
            done = self._done_bytes
        if (
            self._total_bytes >= PROGRESS_FROM_BYTES
            and done * 10 // self._total_bytes > before * 10 // self._total_bytes
        ):
            logger.info("%s: %d of %d MB", self._what, done // 10**6, self._total_bytes // 10**6)


def http_status(exc: Any) -> int:
    """The HTTP status of a botocore ClientError."""
    return int(exc.response["ResponseMetadata"]["HTTPStatusCode"])


@contextlib.contextmanager
def translated(*, uri: str, endpoint: str, bucket_field: str) -> Iterator[None]:
    """Turn what boto3 and the local disk raise inside the block into our own errors.

    `bucket_field` is what the user changes when the bucket does not exist.
    """
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        HTTPClientError,
        NoCredentialsError,
        PartialCredentialsError,
        ReadTimeoutError,
    )
    from botocore.exceptions import ConnectionError as NoConnection

    try:
        yield
    except FineloopError:
        raise
    except (Boto3Error, BotoCoreError, ClientError) as exc:
        # boto3's managed transfers hide the error that names the cause behind one of their own.
        cause = exc.__context__ if isinstance(exc, Boto3Error) and exc.__context__ else exc
        if isinstance(cause, ClientError):
            raise _refusal(cause, uri=uri, endpoint=endpoint, bucket_field=bucket_field) from cause
        if isinstance(cause, NoCredentialsError | PartialCredentialsError):
            raise StoreError(
                f"no credentials for {uri} at {endpoint}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            ) from exc
        if isinstance(cause, ReadTimeoutError):
            raise StoreError(
                f"the store at {endpoint} did not answer for {READ_TIMEOUT_S} s about {uri}: look whether it is "
                "overloaded, and run this again"
            ) from exc
        if isinstance(cause, NoConnection | HTTPClientError):
            raise StoreError(
                f"the store at {endpoint} cannot be reached ({type(cause).__name__}) for {uri}: "
                "start it, or set AWS_ENDPOINT_URL to one that runs"
            ) from exc
        raise StoreError(f"{uri} at {endpoint} failed: {cause}") from exc
    except OSError as exc:  # after botocore's, some of which are OSErrors too
        raise _disk_error(exc, uri) from exc


@contextlib.contextmanager
def disk_errors(where: object) -> Iterator[None]:
    """Turn what the local disk raises inside the block into one error that names the file, or else `where`.

    Raises:
        FineloopError: the disk is full, or a path cannot be read or written.
    """
    try:
        yield
    except FineloopError:  # a StoreError is an OSError too
        raise
    except OSError as exc:
        raise _disk_error(exc, where) from exc


def _disk_error(exc: OSError, where: object) -> FineloopError:
    return FineloopError(
        f"{exc.filename or where}: {exc.strerror or exc}: free some space there, or choose another folder"
    )


def _refusal(exc: Any, *, uri: str, endpoint: str, bucket_field: str) -> StoreError:
    status = http_status(exc)
    code = str(exc.response.get("Error", {}).get("Code", status))
    if code == "NoSuchBucket":
        bucket = uri.removeprefix("s3://").partition("/")[0]
        return StoreError(f"there is no bucket {bucket!r} at {endpoint}: create it or change {bucket_field}")
    if status == 404:
        return ObjectMissing(f"{uri} does not exist")
    if status in (409, 412):
        return Conflict(f"{uri} was created or changed by another writer ({code})")
    if code in WRONG_REGION:
        return StoreError(
            f"{uri} lies in another region than the client asks ({code}): set AWS_DEFAULT_REGION to the bucket's region"
        )
    if code in BAD_SESSION:
        return StoreError(f"the session for {uri} at {endpoint} has ended ({code}): renew AWS_SESSION_TOKEN")
    if code == "RequestTimeTooSkewed":
        return StoreError(f"the store at {endpoint} refused {uri} ({code}): set this machine's clock")
    if status in (401, 403):
        return StoreError(
            f"the store at {endpoint} refused the credentials for {uri} ({code}): check AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, and what they are allowed to do"
        )
    return StoreError(f"the store at {endpoint} failed on {uri} with {code} (HTTP {status})")
