"""Somebody has read their base's code and allowed it, and meets a version whose lineage names a stranger's base.

Both bases are folders with code of their own, which writes a file whenever Python imports it: that file is the judge.
The version is the one that their own training published, with the stranger's base in its lineage, published again by
the registry's own function: what whoever may write to the registry can do.
"""

import json
import shutil
from pathlib import Path

import pytest

from tests.journeys.conftest import Person

pytestmark = [pytest.mark.e2e, pytest.mark.full]

MODELING = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM

pathlib.Path({ran!r}).touch()

class MarkedConfig(LlamaConfig):
    model_type = "marked"

class MarkedForCausalLM(LlamaForCausalLM):
    config_class = MarkedConfig
"""
FORGED = """
import sys
from pathlib import Path
from components.config import config_file
from components.config.schema import ModelConfig
from components.store import folders
from components.registry import versions
from components.registry.identity import version_key
from components.store.store import Store
from ray_jobs.base import base_model
strangers = sys.argv[1]
store = Store.open(config_file.load(Path("colours.toml")).registry)
version = versions.resolve(store, "colours")
key = version_key(version.name, version.version)
names = folders.read_manifest(store, key).files.keys() - {"lineage.json"}
files = {name: store.get(f"{key}/{name}") for name in names}
files["adapter_config.json"] += b" "
lineage = versions.read_lineage(store, version)
lineage["config"]["model"]["base"] = strangers
lineage["base"] = {"reference": strangers, "identity": base_model.resolve(ModelConfig(base=strangers)).identity}
lineage.pop("files")
print(versions.publish_version(store, "colours", files, lineage=lineage).version)
"""


def with_code(folder: Path) -> Path:
    """Make a base need its own code; returns the file that the code writes."""
    ran = folder.with_name(f"{folder.name}-ran")
    (folder / "modeling_marked.py").write_text(MODELING.format(ran=str(ran)))
    config = json.loads((folder / "config.json").read_text())
    named = {"AutoConfig": "modeling_marked.MarkedConfig", "AutoModelForCausalLM": "modeling_marked.MarkedForCausalLM"}
    config |= {"model_type": "marked", "architectures": ["MarkedForCausalLM"], "auto_map": named}
    (folder / "config.json").write_text(json.dumps(config))
    return ran


@pytest.fixture(scope="module")
def stranger(person: Person) -> tuple[Person, str, Path]:
    """The person; the stranger's base with its version in production; the file that its code would write."""
    config = person.has_colours()
    own, strangers = person.folder / "base", person.folder / "strangers"
    shutil.copytree(own, strangers)
    own_ran, ran = with_code(own), with_code(strangers)
    config.write_text(config.read_text().replace("max_length", "trust_remote_code = true\nmax_length"))
    person.does("fineloop train -c colours.toml")
    assert own_ran.exists()  # consent to one's own base lets its code run
    forged = person.has("forged.py", FORGED)
    python = f'eval "$(fineloop store env)" && python {forged} {strangers}'
    version = person.does(f"fineloop store up && {python}").stdout.split()[-1]
    person.does(f"fineloop adapters promote colours@{version} -c colours.toml")
    assert not ran.exists()
    return person, version, ran


def test_nothing_of_another_base_runs_for_chat_or_export_or_where_its_version_is_the_champion(
    stranger: tuple[Person, str, Path],
) -> None:
    person, version, ran = stranger
    for line in (
        f"echo sky | fineloop chat colours@{version} -c colours.toml",
        f"fineloop adapters export colours@{version} --merged -c colours.toml",
        f"fineloop adapters export colours@{version} --lora -c colours.toml",
        "fineloop run -c colours.toml --set train.max_steps=2",
    ):
        done = person.types(line)
        assert done.exit_code == 2, (line, done.screen)
        assert f"its base {person.folder / 'strangers'} comes with Python code of its own" in done.screen
        assert f"allows that of {person.folder / 'base'} alone" in done.screen
        assert not ran.exists(), line


def test_who_has_read_the_other_bases_code_says_so_by_its_name(stranger: tuple[Person, str, Path]) -> None:
    person, version, ran = stranger
    wanted = f"--set model.base={person.folder / 'strangers'} --set model.trust_remote_code=true"
    done = person.does(f"echo sky | fineloop chat colours@{version} {wanted}")
    assert "colours |" in done.stdout
    assert ran.exists()
