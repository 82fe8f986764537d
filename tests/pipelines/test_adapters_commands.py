"""What `fineloop adapters` says of a registry, who moves an alias by it, and what it asks them for."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from components.registry.aliases import promote, read_alias
from components.registry.cache import LISTED
from components.registry.event_log import append_event
from components.store import folders
from components.store.store import Store
from pipelines.cli import main
from tests.components.handover.published import written
from tests.doubles.http_server import serving
from tests.pipelines.command_line import pem, publish_sums

Adapters = Callable[..., dict[str, Any]]


@pytest.fixture
def adapters(answer: Adapters) -> Adapters:
    return partial(answer, "adapters")


def test_a_move_is_announced_and_told_again_on_request(store, adapters, caplog):
    version = publish_sums(store, "one")
    heard: list[dict[str, Any]] = []

    def handle(_verb: str, _path: str, _query: Any, body: bytes, _headers: Any) -> tuple[int, Any]:
        heard.append(json.loads(body))
        return 200, {}

    away = ["--set", "announce.webhook=http://127.0.0.1:9/"]
    assert adapters("promote", f"sums@{version}", *away)["to"] == version
    assert "`fineloop adapters announce sums@production` notifies it again" in caplog.text
    assert adapters("announce", "sums@production", *away, exit_code=1)["announced"]["webhook"] != "told"
    with serving(handle) as url:
        here = ["--set", f"announce.webhook={url}"]
        again = adapters("announce", "sums", *here)
        assert again == {"name": "sums", "alias": "production", "version": version, "announced": {"webhook": "told"}}
        assert adapters("promote", f"sums@{version}", "--alias", "staging", *here)["announced"] == {"webhook": "told"}
    assert [(each["alias"], each["version"]) for each in heard] == [("production", version), ("staging", version)]
    assert "names nothing to notify" in adapters("announce", "sums", exit_code=2)["error"]["message"]


def test_a_new_version_gets_a_share_of_the_requests_beside_production(store: Store, adapters: Adapters) -> None:
    release = written()
    old, new = (
        replace(release, files={"adapter_model.safetensors": weights}).published(store).version
        for weights in (b"1", b"2")
    )
    promote(store, "icd", old)
    answer = adapters("serve-manifest", f"icd@{new}", "--for", "llm-d", "--share", "10")
    (rule,) = answer["manifest"]["spec"]["rules"]
    weights = {each["modelRewrite"]: each["weight"] for each in rule["targets"]}
    assert weights == {f"icd@{old}": 90, f"icd@{new}": 10}
    assert answer["version"] == new
    copy = "s3://models/base"
    made = adapters("serve-manifest", f"icd@{new}", "--for", "kserve", "--share", "10", "--base", copy)["manifest"]
    assert [service["spec"]["model"]["uri"] for service in made["items"]] == [copy, copy]


def test_what_is_held_is_signed_by_one_command_and_a_version_is_revoked_by_another(
    store: Store, adapters: Adapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (publish_sums(store, weights) for weights in ("one", "two"))
    monkeypatch.setenv("FINELOOP_SIGNING_KEY", pem(Ed25519PrivateKey.generate()))
    promote(store, "sums", one)
    public = adapters("sign", "sums")["public_key"]
    trusting = ["--set", f'registry.trusted_keys=["{public}"]']
    assert adapters("sign", f"sums@{two}", "--alias", "staging")["alias"] == "staging"
    assert "for production: let a run" in adapters("promote", f"sums@{two}", *trusting, exit_code=1)["error"]["message"]
    adapters("promote", f"sums@{two}", "--alias", "staging", *trusting)
    assert adapters("sign", "sums@staging")["alias"] == "staging"
    held = adapters("sign", "--held", "sums", *trusting)["signed"]
    assert [(each["version"], each["alias"]) for each in held] == [(one, "production"), (two, "staging")]
    unheeded = adapters("revoke", f"sums@{two}", "--reason", "it tells names", exit_code=2)
    assert f"registry.trusted_keys lacks {public}" in unheeded["error"]["message"]
    assert adapters("revoke", "sums@staging", "--reason", "it tells names", *trusting)["aliases"] == ["staging"]
    refused = adapters("pull", f"sums@{two}", "--to", str(tmp_path / "two"), *trusting, exit_code=1)
    assert f"sums {two} is revoked (it tells names; s3://" in refused["error"]["message"]
    (finding,) = adapters("audit", *trusting, exit_code=1)["findings"]
    assert finding["what"].startswith("is in use as staging, and revoked: it tells names")


def test_a_registry_is_audited_signed_asked_and_collected(store, adapters, tmp_path, monkeypatch):
    one, two = (
        publish_sums(store, weights, run_id="r", dataset={"dataset_id": f"d-{weights}"}) for weights in ("one", "two")
    )
    for dataset in ("d-one", "d-two"):
        folders.publish(store, f"datasets/{dataset}", {"profile.json": b"{}"}, about={})
    promote(store, "sums", one)
    assert adapters("audit") == {"adapters": [{"name": "sums", "versions": 2, "events": 3}], "findings": []}

    refused = adapters("sign", f"sums@{one}", exit_code=2)
    assert "set FINELOOP_SIGNING_KEY_FILE" in refused["error"]["message"]
    monkeypatch.setenv("FINELOOP_SIGNING_KEY", pem(Ed25519PrivateKey.generate()))
    public = adapters("sign", f"sums@{one}")["public_key"]
    trusting = ["--set", f'registry.trusted_keys=["{public}"]']
    assert adapters("audit", *trusting)["findings"] == []
    unsigned = adapters("promote", f"sums@{two}", *trusting, exit_code=1)
    assert f"sums {two} is signed by none of registry.trusted_keys" in unsigned["error"]["message"]

    assert [each["version"] for each in adapters("lineage", "sums", "--of", "dataset=d-two")["versions"]] == [two]
    assert adapters("lineage", f"sums@{two}", "--tree")["versions"][0]["made_from"] == [
        {"kind": "dataset", "name": "d-two"}
    ]

    rules = ["--keep-last", "0", "--older-than-days", "0"]
    assert [each["name"] for each in adapters("gc", *rules)["removals"]] == [f"sums@{two}", "d-two"]
    assert adapters("gc", *rules, "--delete")["deleted"] is True
    assert adapters("gc", *rules)["removals"] == []
    assert adapters("audit")["findings"] == []
    store.put(f"adapters/sums/versions/{one}/adapter_config.json", b"{ }")
    assert len(adapters("audit", exit_code=1)["findings"]) >= 1


def test_a_name_that_there_is_not_is_wrong_input_and_said_with_those_that_there_are(store, published, adapters, answer):
    asked = [
        *((verb, "nope") for verb in ("list", "show", "history", "verify", "audit", "gc", "page", "lineage")),
        *(("promote", "sums@v000"), ("pull", "sums@v000"), ("promote", "sums@staging")),
        ("lineage", "nope", "--of", "dataset=x"),
        ("rollback", "sums"),
        ("rollback", "sums", "--alias", "staging"),
        ("rollback", "sums", "--to", "v000"),
    ]
    before = {info.key for info in store.list("")}
    for words in asked:
        message = adapters(*words, exit_code=2)["error"]["message"]
        assert words[1].partition("@")[0] in message, words
    assert "there is no run 'nope'" in answer("replay", "nope", exit_code=2)["error"]["message"]
    assert {info.key for info in store.list("")} == before


def test_a_move_that_changes_nothing_says_since_when_and_going_back_takes_first_digits(
    store: Store, published: list[str], adapters: Adapters, config_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = published
    began = read_alias(store, "sums", "production").since
    since = f"{began[:10]} {began[11:16]} UTC"
    lost = adapters("promote", f"sums@{two}", "--expect", "vdead", exit_code=1)
    assert "held by" in lost["error"]["message"]
    assert lost["conflict"]["version"] == one
    for words in (["--expect", one], []):
        assert main(["adapters", "promote", f"sums@{one}", "-c", str(config_path), *words]) == 0
        assert capsys.readouterr().out.strip() == f"sums@production: already {one} since {since}"
    assert adapters("promote", f"sums@{one}")["moved"] is False
    assert "moved" not in adapters("promote", f"sums@{two}")
    back = adapters("rollback", "sums", "--to", one[:6])
    assert (back["from"], back["to"]) == (two, one)
    assert adapters("rollback", "sums", "--expect", two)["moved"] is False


def test_a_refused_version_promoted_by_hand_is_overridden(store, published, adapters, config_path, capsys):
    new = published[1]
    append_event(store, "sums", "refused", {"version": new, "alias": "production", "run_id": "r"})
    store.put_json(LISTED, {"sums": {"in_production": "the old one"}, "other": {"in_production": "its own"}})
    refused = adapters("promote", f"sums@{new}", exit_code=2)["error"]["message"]
    assert f"the gate holds sums {new}, and this overrides it: say who answers for it and why" in refused
    assert store.get_json(LISTED).keys() == {"sums", "other"}
    adapters("promote", f"sums@{new}", "--by", "ada", "--reason", "the test set is wrong")
    event = adapters("history", "sums")["events"][-1]
    assert event["kind"] == "overridden"
    assert (event["body"]["actor"], event["body"]["reason"]) == ("ada", "the test set is wrong")
    assert store.get_json(LISTED).keys() == {"other"}  # the next run reads what is in production of sums
    assert main(["adapters", "history", "sums", "-c", str(config_path)]) == 0
    assert "by ada: the test set is wrong" in capsys.readouterr().out.splitlines()[-1]


def test_what_stands_in_staging_goes_to_production(published: list[str], adapters: Adapters) -> None:
    old, new = published
    moved = adapters("promote", f"sums@{new}", "--alias", "staging")
    assert (moved["alias"], moved["from"], moved["to"]) == ("staging", None, new)
    assert [adapters("show", f"sums@{alias}")["version"] for alias in ("staging", "production")] == [new, old]
    assert adapters("promote", "sums@staging")["to"] == new
    assert adapters("show", f"sums@{new}")["aliases"] == ["production", "staging"]
    assert adapters("rollback", "sums")["to"] == old
    assert adapters("show", "sums@staging")["version"] == new
