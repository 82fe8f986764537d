"""The command line as a process: exit codes, what goes to which stream, and what help loads."""

import hashlib
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from components.config import config_file
from components.registry import signing
from components.store import folders
from components.store.store import Store
from docs.generate import commands
from pipelines import cli
from pipelines.commands import run
from pipelines.commands.arguments import load_config, name_from
from pipelines.configs import DEFAULT_CONFIG
from tests.models.zoo import TEXT
from tests.pipelines.command_line import ROOT, body, fineloop, publish_sums

pytestmark = pytest.mark.usefixtures("forked")

EXPORT = ["adapters", "export", "colours"]
HEAVY = {"boto3", "botocore", "cryptography", "jinja2", "kfp", "numpy", "pyarrow", "pydantic", "torch", "transformers"}


def test_help_teaches_every_command_and_loads_nothing_heavy(tmp_path: Path) -> None:
    for name, command in commands(cli.parser(), "fineloop"):
        text = command.format_help()
        assert "exit codes:" in text
        assert re.search(rf"example:\n  .*{name}", text), name
        assert "--json" in text
    code = "import sys, pipelines.cli as cli; cli.main([]); print(*sys.modules)"
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # ASCII, whatever the source has
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    *lines, modules = done.stdout.splitlines()
    assert not HEAVY & set(modules.split())
    assert "also: serve, " in "\n".join(lines)
    assert cli.parser().format_help().splitlines() == lines  # what the source says is what all modules declare
    assert "--with-base" in fineloop("completion", "bash", cwd=tmp_path).stdout
    assert fineloop("--help", cwd=tmp_path).stdout.splitlines() == lines
    assert "also: approve, " in fineloop("adapters", "--help", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--set", "learning_rate"], "expected section.key=value"),
        (["adapters", "list"], "--home"),
        (["schedule", "create", "nightly", "--cron", "0 25 * * *"], "bad hour: minute takes 0-59, hour 0-23"),
        (["runs", "list", "--state", "done"], "canceled"),
        (["trian"], "did you mean train?"),
        (["plan", "--sett", "x=1"], "unrecognized arguments: --sett x=1: did you mean --set?"),
        (["init"], "your data is not named: give DATA"),
        (["sweep", "--apply"], "name a config of your own with -c"),
        (["chat", "colours", "--max-tokens", "0"], "expected at least 1"),
        (["chat", "colours", "--temperature", "-1"], "expected 0 or more"),
        ([*EXPORT, "--lora", "--base", "original"], "--base goes with --merged or --gguf, not with --lora"),
        ([*EXPORT, "--lora", "--dtype", "float32"], "--dtype goes with --merged or --gguf"),
        ([*EXPORT, "--merged", "--approximate", "8"], "--approximate goes with --lora"),
        ([*EXPORT, "--lora", "--approximate", "0"], "a rank is at least 1"),
        ([*EXPORT, "--merged", "--converter", "x.py"], "--converter goes with --gguf, not with --merged"),
        (EXPORT, "--merged --lora --gguf is required"),
        (
            ["run", "--set", "train.lr=1"],
            "fineloop: --set train.lr=1: unknown key train.lr: did you mean train.learning_rate?",
        ),
    ],
)
def test_a_wrong_argument_is_exit_2_in_one_message(arguments, message, tmp_path, monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    done = fineloop(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs", "list", "--limit", "many", "--json"], "argument --limit: invalid int value: 'many'"),
        (["adapters", "shw", "--json"], "did you mean show?"),
        (["data", "erase", "--json"], "the following arguments are required: ID, or --user NAME"),
        (["compile", "--json", "--set", "model.bas=x"], "model.base"),
    ],
)
def test_an_error_of_the_arguments_is_one_object_with_json(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = fineloop(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stdout.splitlines()
    error = json.loads(line)
    assert (error["error"]["kind"], error["exit_code"]) == ("ConfigError" if "--set" in arguments else "UserError", 2)
    assert message in error["error"]["message"]


@pytest.mark.parametrize(
    ("arguments", "source"),
    [
        (["--html", "x.html", "rows.jsonl"], "rows.jsonl"),
        ([], ""),
        (["./erase"], "./erase"),
        (["--json", "erase"], "erase"),
    ],
    ids=str,
)
def test_data_takes_a_file_wherever_no_verb_stands_first(arguments: list[str], source: str) -> None:
    options = cli.parser().parse_args(["data", *arguments])
    assert (options.data, options.command.__name__) == (source, "data")


def test_data_erase_takes_ids_and_options_in_any_order() -> None:
    options = cli.parser().parse_args(["data", "erase", "1", "2", "--by", "ada", "--json"])
    assert (options.ids, options.by, options.json) == (["1", "2"], "ada", True)
    assert cli.parser().parse_args(["data", "erase", "--json", "--", "-1", "erase"]).ids == ["-1", "erase"]


def test_the_command_says_its_release(tmp_path: Path) -> None:
    release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert fineloop("--version", cwd=tmp_path).stdout.split() == ["fineloop", release]


def test_schema_is_the_file_beside_the_configs(tmp_path: Path) -> None:
    done = fineloop("schema", cwd=tmp_path)
    assert done.stdout == (DEFAULT_CONFIG.parent / "schema.json").read_text()
    assert body(fineloop("schema", "--json", cwd=tmp_path)) == json.loads(done.stdout)


def test_compile_writes_either_pipeline_where_it_is_asked_to(tmp_path: Path) -> None:
    for pipeline, step in (("retrain", "comp-finetune"), ("promotion", "comp-move-by-hand")):
        done = fineloop("compile", "--pipeline", pipeline, "-o", "out.yaml", "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        written = (tmp_path / "out.yaml").read_bytes()
        assert body(done)["sha256"] == hashlib.sha256(written).hexdigest()
        specification = next(yaml.safe_load_all(written))
        assert any(name.startswith(step) for name in specification["components"])


def test_relative_paths_mean_the_users_directory_and_addresses_and_hub_ids_stay(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    for source, base, absolute in (
        ("rows/*.jsonl", "base", (f"{tmp_path}/rows/*.jsonl", f"{tmp_path}/base")),
        ('["s3://b/k", "rows.jsonl"]', "org/model", (["s3://b/k", f"{tmp_path}/rows.jsonl"], "org/model")),
    ):
        arguments = ["--set", f"data.source={source}", "--set", f"model.base={base}", "--set", "adapter.name=x"]
        assert fineloop("compile", "-o", "out.yaml", *arguments, cwd=tmp_path).returncode == 0
        specification, *_ = yaml.safe_load_all((tmp_path / "out.yaml").read_text())
        config = specification["root"]["inputDefinitions"]["parameters"]["config"]["defaultValue"]
        assert (config["data"]["source"], config["model"]["base"]) == absolute


@pytest.mark.parametrize(
    ("arguments", "name", "records"),
    [
        (["--set", "data.source=rows.jsonl", "--set", "data.max_records=7"], "icd10-chapters", 7),
        ([], "icd10-chapters", 2300),
        (["My Rows.jsonl"], "my-rows", 0),
        (["My Rows.jsonl", "-c", "own.toml"], "mine", 5),
    ],
    ids=str,
)
def test_other_data_in_the_example_s_config_are_taken_whole(arguments, name, records, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = DEFAULT_CONFIG.read_text().replace("icd10-chapters", "mine").replace("2300", "5")
    Path("own.toml").write_text(own)
    options = cli.parser().parse_args(["run", *arguments])
    config = load_config(options)
    assert load_config(options) == config
    assert (config.adapter.name, config.data.max_records) == (name, records)
    is_other = arguments and "own.toml" not in arguments
    nights = (config.data.window_days, config.data.replay_share, config.train.start_from)
    assert nights == ((0, 0, "base") if is_other else (300, 0.5, "production"))
    if "My Rows.jsonl" in arguments:
        assert config.data.source == str(tmp_path / "My Rows.jsonl")


@pytest.mark.parametrize(
    "stem",
    ["2026-12-04", "2026-12-04T02:00:00", "02:30:00", "20261204", "1_000", "0x1f", "1", "1e5", "true", "inf", "nan"],
)
@pytest.mark.parametrize("verb", ["run", "train", "data"])
def test_a_file_called_like_a_value_of_toml_gives_the_adapter_its_name(stem: str, verb: str) -> None:
    options = cli.parser().parse_args([verb, f"{stem}.jsonl"])
    config = load_config(options)
    assert config.data.source == str(Path(f"{stem}.jsonl").absolute())
    assert config.adapter.name == name_from(f"{stem}.jsonl")


def test_adapters_are_listed_shown_verified_and_pulled(store, published, config_path, tmp_path):
    where = ("-c", config_path)
    old, new = published

    listed = body(fineloop("adapters", "list", *where, "--json", cwd=tmp_path))
    assert listed["adapters"] == [{"name": "sums", "newest": new, "versions": 2, "aliases": {"production": old}}]
    versions_of = body(fineloop("adapters", "list", "sums", *where, "--json", cwd=tmp_path))["versions"]
    assert [version["version"] for version in versions_of] == [new, old]
    shown = body(fineloop("adapters", "show", "sums", *where, "--json", cwd=tmp_path))
    assert {"name", "version", "version_uri", "aliases", "manifest_sha256", "metrics", "servable_as"} <= shown.keys()
    assert (shown["version"], shown["aliases"]) == (old, ["production"])
    assert (shown["servable_as"], shown["serving"]) == ("lora", ["a setting"])
    lineage = body(fineloop("adapters", "lineage", f"sums@{new[:6]}", *where, "--json", cwd=tmp_path))
    assert lineage["run_id"] == "run-two"
    assert body(fineloop("adapters", "verify", f"sums@{new}", *where, "--json", cwd=tmp_path))["verified"] is True
    pulled = body(fineloop("adapters", "pull", f"sums@{new}", "--to", "here", *where, "--json", cwd=tmp_path))
    assert pulled == {"path": str(tmp_path / "here"), "version": new, "verified": True}
    assert (tmp_path / "here" / "adapter_model.safetensors").read_bytes() == b"two"


def test_an_adapter_is_pulled_with_the_base_of_its_own_by_the_digest_that_its_signed_version_names(
    store: Store, published: list[str], config_path: Path, tmp_path: Path
) -> None:
    base = folders.publish(store, "bases/b1", {"weights": b"good"})
    key = Ed25519PrivateKey.generate()
    made = []
    for weights, recipe in (("named", {"stands_on_sha256": base.sha256}), ("unnamed", {})):
        made.append(publish_sums(store, weights, recipe={"stands_on": store.uri("bases/b1"), **recipe}))
        signing.sign(store, "sums", made[-1], key, alias="production")
    trusting = ("--set", f'registry.trusted_keys=["{signing.public_text(key)}"]')

    def pull(reference: str, to: str, *more: str) -> subprocess.CompletedProcess[str]:
        where = ("--to", to, "--with-base", "-c", config_path, "--json")
        return fineloop("adapters", "pull", reference, *where, *more, cwd=tmp_path)

    for _ in range(2):
        assert body(pull(f"sums@{made[0]}", "one", *trusting))["base_path"] == str(tmp_path / "one-base")
        assert (tmp_path / "one-base" / "weights").read_bytes() == b"good"
    done = pull(f"sums@{made[1]}", "two", *trusting)
    assert (done.returncode, "does not say which bytes" in done.stderr) == (1, True)
    store.delete([info.key for info in store.list("bases/b1/")])
    folders.publish(store, "bases/b1", {"weights": b"EVIL"})  # manifest and all
    done = pull(f"sums@{made[0]}", "three", *trusting)
    assert (done.returncode, (tmp_path / "three-base").exists()) == (1, False)
    assert base.sha256 in done.stderr


def test_pages_replace_their_own_index_and_nobody_elses(published, config_path, tmp_path):
    page = ("adapters", "page", "--to", "site", "-c", config_path)
    for _ in range(2):
        assert fineloop(*page, cwd=tmp_path).returncode == 0
    index = tmp_path / "site" / "index.html"
    index.write_text("<h1>My own</h1>")
    refused = fineloop(*page, cwd=tmp_path)
    assert refused.returncode == 2
    assert f"{index} is no page of Fineloop's" in refused.stderr
    assert index.read_text() == "<h1>My own</h1>"


@pytest.mark.parametrize("group", ["store", "ray"])
def test_env_of_a_server_that_is_not_up_says_how_to_start_it(group: str, tmp_path: Path) -> None:
    done = fineloop(group, "env", cwd=tmp_path)
    assert done.returncode == 1
    assert f"fineloop {group} up" in done.stderr
    assert done.stdout == ""


def test_doctor_says_once_that_a_server_is_away_and_what_to_set(tmp_path: Path) -> None:
    done = fineloop("doctor", "--host", "http://127.0.0.1:9", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == ""  # urllib3 would name each of its retries
    kubeflow, kubernetes = done.stdout.splitlines()
    assert kubeflow.startswith("FAIL  kubeflow pipelines")
    assert re.match("FAIL  kubernetes .* /nowhere.*set KUBECONFIG", kubernetes)


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["adapters", "ro"], {"rollback"}),
        (["adapters", "export", "--conf"], {"--config"}),
        (["completion", "z"], {"zsh"}),
    ],
)
def test_bash_completes_commands_options_and_choices(typed: list[str], offered: set[str], tmp_path: Path) -> None:
    (tmp_path / "fineloop").write_text(fineloop("completion", "bash", cwd=tmp_path).stdout)
    offer = 'source ./fineloop; COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)); _shtab_fineloop; echo "${COMPREPLY[@]}"'
    command = ["bash", "-c", offer, "bash", "fineloop", *typed]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == offered


CONFIG = """
adapter.name = "sums"
model = {base = "base", max_length = 64}
data = {source = "rows.jsonl", max_records = 1000}
ray = {use_gpu = true, gpu = "L4"}
"""
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


@pytest.fixture
def planned(tmp_path: Path) -> Path:
    """A config, and the configuration of a base: no weights, no data."""
    (tmp_path / "plan.toml").write_text(CONFIG)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(LLAMA | TEXT))
    return tmp_path


def test_a_plan_is_a_table_for_people_and_one_object_for_scripts(planned: Path) -> None:
    done = fineloop("plan", "-c", "plan.toml", "--json", cwd=planned)
    assert done.returncode == 0, done.stderr
    body = json.loads(done.stdout)
    assert (body["method"], body["device"], body["fits"]) == ("qlora", "L4", True)
    assert done.stderr.startswith("rehearsing a training step of ")
    for line in ("qlora on", "weights", "total", "fits: 22.5 on L4", "full fine-tuning", "$0.805", "advised"):
        assert line in done.stderr
    for part, size in body["memory_bytes"].items():
        assert f"  {part:<12} {size / 2**30:7.2f}" in done.stderr
    elastic = "\n".join(run.plan_lines(config_file.load(planned / "plan.toml"), {**body, "max_workers": 3}))
    assert ("planned are the fewest" in elastic, "planned are the fewest" in done.stderr) == (True, False)


@pytest.mark.slow
def test_a_plan_of_all_methods_has_a_line_for_each_and_the_reason_why_one_is_refused(planned: Path) -> None:
    kept = ("--set", "method.base=bf16", "--set", "method.name=lora")
    done = fineloop("plan", "-c", "plan.toml", *kept, "--json", "--all-methods", cwd=planned)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["methods"]) == 8
    refused = {row["method"]: row["refused"] for row in json.loads(done.stdout)["methods"] if "refused" in row}
    for method, why in refused.items():
        assert any(line.startswith(method) and line.endswith(f"refused: {why}") for line in done.stderr.splitlines())
    assert "dvora" in done.stderr


@pytest.mark.parametrize(
    ("kind", "fits", "gib", "exit_code"),
    [("rayjob", True, 129, 1), ("rayjob", True, 100, 0), ("jobs-api", True, 129, 0), ("jobs-api", False, 1, 1)],
)
def test_a_plan_that_does_not_fit_and_a_base_that_no_pods_disk_holds_are_exit_1(
    planned: Path, monkeypatch: pytest.MonkeyPatch, kind: str, fits: bool, gib: int, exit_code: int
) -> None:
    monkeypatch.setattr(run, "answer_of", lambda *_: {"fits": fits, "disk_bytes": gib * 2**30})
    monkeypatch.setattr(run, "plan_lines", lambda *_: [])
    arguments = ["plan", "-c", str(planned / "plan.toml"), "--set", f"ray.cluster.kind={kind}"]
    assert run.plan(cli.parser().parse_args(arguments)).exit_code == exit_code
