import importlib.util

import pytest

from components.config import config_file
from components.shared.machine import this_cpu
from pipelines.local import doctor
from pipelines.local.local_services import local_services

pytestmark = pytest.mark.usefixtures("nothing_is_configured")


def kept_in(bucket, ray=""):
    return config_file.loads(
        f'[adapter]\nname = "a"\n[model]\nbase = "b"\n[data]\nsource = "c"\n[registry]\nbucket = "{bucket}"\n{ray}'
    )


def by_name(found):
    return {check.name: check for check in found}


def test_every_check_says_what_it_saw_and_a_bad_one_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "HOME_DISK_BYTES", 2**60)
    found = doctor.checks(tmp_path / "home", kept_in("bucket-one"))
    assert all(check.detail for check in found)
    assert all(bool(check.fix) is not check.ok for check in found)
    assert {"python", "memory", "cores", "packages", "embedded store", "store", "ray"} <= set(by_name(found))
    assert this_cpu().kind in by_name(found)["processor"].detail
    assert not by_name(found)["disk at --home"].ok
    assert not (tmp_path / "home").exists()


def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else real(name))
    check = by_name(doctor.checks(tmp_path, kept_in("bucket-one")))["train packages"]
    assert (check.ok, check.detail, check.fix) == (False, "missing: peft", "pip install -e '.[train]'")


def test_the_embedded_store_that_is_up_is_written_and_read(tmp_path):
    with local_services(tmp_path, bucket="bucket-one", ray=False) as environment:
        check = by_name(doctor.checks(tmp_path, kept_in("bucket-one")))["store"]
        assert check.ok
        assert environment["AWS_ENDPOINT_URL"] in check.detail
        missing = by_name(doctor.checks(tmp_path, kept_in("bucket-two")))["store"]
    assert not missing.ok
    assert "bucket-two" in missing.detail


def test_a_configured_store_or_ray_that_does_not_answer_is_a_finding_not_a_crash(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    found = by_name(doctor.checks(tmp_path, kept_in("bucket-one")))
    assert (found["store"].ok, found["ray"].ok) == (False, False)
    assert "http://127.0.0.1:9" in found["store"].detail
    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:10001")
    assert "Jobs API" in by_name(doctor.checks(tmp_path, kept_in("bucket-one")))["ray"].fix


def test_a_secret_without_which_people_get_no_message_is_missed(tmp_path, monkeypatch):
    announce = '[announce]\nwebhook = "http://a"\npeople = ["slack", "a@b.org", "c@d.org"]'
    config = kept_in("bucket", announce)
    check = by_name(doctor.checks(tmp_path, config))["notified"]
    assert not check.ok
    assert check.detail.endswith("the webhook unsigned; not set: FINELOOP_SLACK_WEBHOOK, FINELOOP_SMTP_URL")
    for name in ("FINELOOP_WEBHOOK_SECRET", "FINELOOP_SLACK_WEBHOOK", "FINELOOP_SMTP_URL"):
        monkeypatch.setenv(name, "x")
    check = by_name(doctor.checks(tmp_path, config))["notified"]
    assert (check.ok, check.detail) == (True, "webhook, people.slack, people.a@b.org, people.c@d.org")
    assert by_name(doctor.checks(tmp_path, kept_in("bucket")))["notified"].detail == "nobody"


def test_gpus_that_are_not_there_are_a_finding_with_the_way_out(tmp_path, monkeypatch):
    """The judge is Ray: what its own head on this machine would have, which no machine has 1024 of."""
    config = kept_in("bucket-one", "[ray]\nuse_gpu = true\nnum_workers = 1024\n[train]\nbatch_size = 8192\n")
    found = by_name(doctor.checks(tmp_path, config))["gpu"]
    assert not found.ok
    assert "ray.use_gpu=false" in found.fix or "lower it" in found.fix
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    assert by_name(doctor.checks(tmp_path, config))["gpu"].ok
