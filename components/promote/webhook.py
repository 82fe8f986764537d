"""Posts a move of an alias as JSON, signed as GitHub signs its webhooks, so that existing receivers can check it.

https://docs.github.com/en/webhooks/using-webhooks/validating-webhook-deliveries
"""

import hashlib
import hmac
import json
from collections.abc import Mapping

from components.promote.announcement import Announcement
from components.promote.http_api import HttpApi

SECRET = "FINELOOP_WEBHOOK_SECRET"


def notify(url: str, announcement: Announcement, environment: Mapping[str, str]) -> None:
    """Post the announcement, signed if the environment holds a secret.

    A receiver recognises a repeated notification by X-Fineloop-Delivery, the event's id.

    Raises:
        AnnounceError: the receiver cannot be reached, or did not accept it.
    """
    body = json.dumps(announcement.as_json(), sort_keys=True).encode()
    headers = {
        "Content-Type": "application/json",
        "X-Fineloop-Event": announcement.kind,
        "X-Fineloop-Delivery": announcement.event_id,
    }
    if secret := environment.get(SECRET):
        headers["X-Hub-Signature-256"] = signature(body, secret)
    HttpApi(url).deliver(body, headers)


def signature(body: bytes, secret: str) -> str:
    """The HMAC-SHA256 of the body in hex, in the header's form."""
    return f"sha256={hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()}"
