"""A person's store as any other S3 client sees it: plain boto3, with what `fineloop store env` prints."""

import json
from dataclasses import dataclass
from typing import Any

import boto3

from tests.journeys.conftest import Person

NAME = "fineloop"


@dataclass(frozen=True)
class Bucket:
    """A bucket of a store that stays up, or a folder of it, whose keys are those below it."""

    client: Any
    name: str = NAME
    folder: str = ""

    @classmethod
    def of(cls, person: Person) -> "Bucket":
        person.does("fineloop store up")
        printed = person.does("fineloop store env --json").answer
        session = boto3.Session(printed["AWS_ACCESS_KEY_ID"], printed["AWS_SECRET_ACCESS_KEY"], region_name="us-east-1")
        return cls(session.client("s3", endpoint_url=printed["AWS_ENDPOINT_URL"]))

    def keys(self, prefix: str = "") -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=self.folder + prefix)
        return [each["Key"].removeprefix(self.folder) for page in pages for each in page.get("Contents", [])]

    def read(self, key: str) -> bytes:
        return self.client.get_object(Bucket=self.name, Key=self.folder + key)["Body"].read()

    def write(self, key: str, body: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=self.folder + key, Body=body)

    def remove(self, key: str) -> None:
        self.client.delete_object(Bucket=self.name, Key=self.folder + key)

    def json(self, key: str) -> Any:
        return json.loads(self.read(key))

    def log(self, adapter: str) -> list[dict[str, Any]]:
        """Every event of the adapter as it lies there, by its key, which begins with its time."""
        return [self.json(key) for key in self.keys(f"adapters/{adapter}/events/")]
