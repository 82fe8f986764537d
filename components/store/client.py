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

logger = logging.getLogger(__name__)

READ_TIMEOUT_S = 60
ATTEMPTS = 3
ATTEMPTS_WHERE_BUSY = 10  # with the pauses below, 75 to 150 seconds
BUSY_PAUSE_S = 4.0
CONFLICT_PAUSE_S = 0.2
PART_BYTES = 16 * 2**20
TRANSFERS = 4  # parts of one file in flight; TRANSFERS * PART_BYTES bounds the memory of one transfer
HINTS = {
    **dict.fromkeys(
        ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"),
        "set AWS_DEFAULT_REGION to the bucket's region",
    ),
    **dict.fromkeys(("ExpiredToken", "InvalidToken", "TokenRefreshRequired"), "renew AWS_SESSION_TOKEN"),
    "RequestTimeTooSkewed": "set this machine's clock",
}
"""What to do about a refusal with this code."""


@dataclass
class Traffic:
    """Requests, failed attempts included, and bytes of bodies of this process's S3 clients."""

    requests: int = 0
    read_bytes: int = 0
    written_bytes: int = 0


_so_far = Traffic()
_lock = threading.Lock()


def so_far() -> Traffic:
    """The traffic since the process began."""
    with _lock:
        return replace(_so_far)


def _sent(request: Any, **_: Any) -> None:
    with _lock:
        _so_far.requests += 1
        # If a checksum follows the body, the second header has the body's length.
        lengths = (request.headers.get(name) for name in ("Content-Length", "X-Amz-Decoded-Content-Length"))
        _so_far.written_bytes += int(next(filter(None, lengths), 0))


def _received(event_name: str, response_dict: Any = None, **_: Any) -> None:
    if not event_name.endswith(".HeadObject"):  # its length is that of a body that is not sent
        with _lock:
            _so_far.read_bytes += int(((response_dict or {}).get("headers") or {}).get("content-length") or 0)


def client_from_environment() -> Any:
    """An S3 client with the endpoint, the region and the credentials that boto3 finds. Sends nothing to the store.
    Raises StoreError if AWS_ENDPOINT_URL is not a URL, or AWS_PROFILE names no profile."""
    import boto3
    import botocore.session
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    if logging.getLogger("botocore").level == logging.NOTSET:
        # At INFO, which kfp's executor and Ray's workers show, it logs where each client found credentials.
        logging.getLogger("botocore").setLevel(logging.WARNING)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    config = Config(
        signature_version="s3v4",
        # A self-hosted store seldom has a DNS name for each bucket.
        s3={"addressing_style": "path" if endpoint else "auto"},
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        connect_timeout=5,
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
    client.meta.events.register("needs-retry.s3", _pause_s)
    client.meta.events.register("before-send.s3", _sent)
    client.meta.events.register("response-received.s3", _received)
    return client


@cache
def _service_models() -> Any:
    """botocore's reader of its service descriptions, which keeps what it has read: a tenth of a second a client."""
    import botocore.session

    return botocore.session.get_session().get_component("data_loader")


def _pause_s(
    attempts: int, operation: Any, response: Any, caught_exception: Exception | None = None, **_: Any
) -> float | None:
    """Seconds until the next attempt where botocore itself makes none; None to give up.

    A store that sheds load or starts anew answers 503 for minutes. One that cannot be reached is given up at once, but
    in a pod: NetworkPolicies and Service endpoints lag behind a pod's start. A write that is answered with 409 met a
    concurrent operation, and nothing was decided.
    """
    from botocore.exceptions import ConnectTimeoutError, EndpointConnectionError

    status = None if response is None else response[0].status_code
    is_away = isinstance(caught_exception, EndpointConnectionError | ConnectTimeoutError)
    is_undecided = status == 409 and operation.name == "PutObject"
    in_pod = bool(os.environ.get("KUBERNETES_SERVICE_HOST"))
    if attempts >= ATTEMPTS_WHERE_BUSY or not (status == 503 or is_undecided or (is_away and in_pod)):
        return None
    if attempts < ATTEMPTS:
        return CONFLICT_PAUSE_S * attempts if is_undecided else None
    if is_away and attempts == ATTEMPTS:
        logger.warning("the store cannot be reached, for which this pod may be too new: trying again for two minutes")
    return min(BUSY_PAUSE_S * 2 ** (attempts - ATTEMPTS), 30.0) * random.uniform(0.5, 1)


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

    In parts, it is the completion that asks If-None-Match: until then there is no object. Raises ClientError if with
    status 412, the object exists.
    """
    size = path.stat().st_size
    target: Any = {"Bucket": bucket, "Key": full_key}
    checked: Any = {"ChecksumAlgorithm": "SHA256"}
    if size < 2 * PART_BYTES:
        with path.open("rb") as body:
            answer = client.put_object(**target, **checked, Body=body, ContentType=content_type, IfNoneMatch="*")
        return str(answer["ETag"])
    part_bytes = max(PART_BYTES, -(-size // 10_000))  # S3 takes so many parts of one object
    target["UploadId"] = client.create_multipart_upload(**target, **checked, ContentType=content_type)["UploadId"]

    def send(number: int) -> dict[str, Any]:
        with path.open("rb") as file:
            file.seek((number - 1) * part_bytes)
            answer = client.upload_part(**target, **checked, PartNumber=number, Body=file.read(part_bytes))
        return {"PartNumber": number, **{key: answer[key] for key in ("ETag", "ChecksumSHA256") if key in answer}}

    try:
        with ThreadPoolExecutor(TRANSFERS) as pool:
            parts = list(pool.map(send, range(1, -(-size // part_bytes) + 1)))
        answer = client.complete_multipart_upload(**target, MultipartUpload={"Parts": parts}, IfNoneMatch="*")
    except BaseException:
        with contextlib.suppress(Exception):  # a lifecycle rule of the bucket removes what stays
            client.abort_multipart_upload(**target)
        raise
    return str(answer["ETag"])


@contextlib.contextmanager
def translated(*, uri: str, endpoint: str, bucket_field: str) -> Iterator[None]:
    """Turn what boto3 and the local disk raise inside the block into our own errors.

    `bucket_field` is what the user changes when the bucket does not exist.
    """
    from boto3.exceptions import Boto3Error
    from botocore import exceptions as botocore

    try:
        with disk_errors(uri):
            yield
    except FineloopError:
        raise
    except (Boto3Error, botocore.BotoCoreError, botocore.ClientError) as exc:
        # boto3's managed transfers hide the error that names the cause behind one of their own.
        match exc.__context__ if isinstance(exc, Boto3Error) and exc.__context__ else exc:
            case botocore.ClientError() as cause:
                raise _refusal(cause, uri=uri, endpoint=endpoint, bucket_field=bucket_field) from cause
            case botocore.NoCredentialsError() | botocore.PartialCredentialsError():
                why = f"no credentials for {uri} at {endpoint}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            case botocore.ReadTimeoutError():
                why = (
                    f"the store at {endpoint} did not answer for {READ_TIMEOUT_S} s about {uri}: look whether it is "
                    "overloaded, and run this again"
                )
            case (botocore.ConnectionError() | botocore.HTTPClientError()) as cause:
                why = (
                    f"the store at {endpoint} cannot be reached ({type(cause).__name__}) for {uri}: "
                    "start it, or set AWS_ENDPOINT_URL to one that runs"
                )
            case cause:
                why = f"{uri} at {endpoint} failed: {cause}"
        raise StoreError(why) from exc


@contextlib.contextmanager
def disk_errors(where: object) -> Iterator[None]:
    """Turn what the local disk raises inside the block into one error that names the file, or else `where`. Raises
    FineloopError if the disk is full, or a path cannot be read or written."""
    try:
        yield
    except OSError as exc:
        # A StoreError and some of botocore's errors are OSErrors too.
        if isinstance(exc, FineloopError) or type(exc).__module__.startswith("boto"):
            raise
        why = f"{exc.filename or where}: {exc.strerror or exc}: free some space there, or choose another folder"
        raise FineloopError(why) from exc


def _refusal(exc: Any, *, uri: str, endpoint: str, bucket_field: str) -> StoreError:
    status = int(exc.response["ResponseMetadata"]["HTTPStatusCode"])
    code = str(exc.response.get("Error", {}).get("Code", status))
    if code == "NoSuchBucket":
        bucket = uri.removeprefix("s3://").partition("/")[0]
        return StoreError(f"there is no bucket {bucket!r} at {endpoint}: create it or change {bucket_field}")
    if status == 404:
        return ObjectMissing(f"{uri} does not exist")
    if status == 412 or (status == 409 and exc.operation_name != "PutObject"):
        return Conflict(f"{uri} was created or changed by another writer ({code})")
    credentials = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and what they are allowed to do"
    if hint := HINTS.get(code, credentials if status in (401, 403) else ""):
        return StoreError(f"the store at {endpoint} refused {uri} ({code}): {hint}")
    return StoreError(f"the store at {endpoint} failed on {uri} with {code} (HTTP {status})")
