"""Somebody new: their rows, two nights by `init`, a run, a talk, the adapter in a program, the model merged, a server.

The base comes from a hub, a double on loopback that serves one repository as huggingface_hub asks for it. Judges:
transformers and peft in a program that imports nothing of Fineloop, the colours that the rows teach, and for servers
the version's own adapter_config.json, which is what they read.
"""

import json
import re
import shlex
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.doubles import hub
from tests.journeys.conftest import Person
from tests.models.tiny import COLOURS, build_base, colour_rows

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

BASE = "acme/tiny"
ASKED = [f"{number} {thing}" for number, thing in zip((17, 402, 655, 31, 900, 268), COLOURS, strict=True)]
# As the version's model card has it; greedy, as everybody is measured.
ANSWERS = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, prompts = sys.argv[1], sys.argv[2], sys.argv[3:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
if adapter:
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, adapter)
tokenizer = AutoTokenizer.from_pretrained(adapter or base)
found = []
for prompt in prompts:
    turns = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1]:]
    found.append(tokenizer.decode(said, skip_special_tokens=True))
ours = [name for name in sys.modules if name.partition(".")[0] in ("fineloop", "components", "pipelines", "ray_jobs")]
print(json.dumps({"answers": found, "ours": ours}))
"""


@pytest.fixture(scope="module")
def newcomer(person: Person, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Person]:
    """Somebody whose run has been promoted, and who has pulled what it made."""
    person.has_colours(more='[method]\nname = "lora"\nrank = 12\n')
    folder = person.folder / "base"
    config = person.folder / "colours.toml"
    config.write_text(config.read_text().replace(json.dumps(str(folder)), json.dumps(BASE)))
    with hub.serving(BASE, folder) as served:
        somebody = person.with_variables(HF_ENDPOINT=served.url, HF_HOME=str(tmp_path_factory.mktemp("hugging-face")))
        assert somebody.does("fineloop run -c colours.toml --json").answer["promoted"]
        somebody.does("fineloop adapters pull colours --to ./adapter")
        yield somebody


def plain(person: Person, base: Path | str, adapter: str = "") -> list[str]:
    """What transformers, and peft for an adapter, answer in a folder that has nothing of Fineloop on its path."""
    words = ["-P", "-c", ANSWERS, str(base), adapter, *ASKED]
    done = person.does(shlex.join([sys.executable, *words]))
    assert done.answer["ours"] == []
    return [text.strip() for text in done.answer["answers"]]


def test_chat_plain_peft_and_the_merged_folder_in_plain_transformers_answer_the_same(newcomer: Person) -> None:
    done = newcomer.does("fineloop chat colours", typed="".join(f"{each}\n" for each in ASKED))
    replies = re.split(r"(?m)^ *(base|colours) \| ", done.stdout)[1:]
    said = [text.strip() for who, text in pairwise(replies) if who == "colours"]
    # So small a base learns the colours, and not where to stop.
    assert sum(text.startswith(colour) for text, colour in zip(said, COLOURS.values(), strict=True)) >= 5, said
    assert plain(newcomer, BASE, "./adapter") == said
    exported = newcomer.does("fineloop adapters export colours@production --merged --to ./merged --json").answer
    assert plain(newcomer, "./merged") == said
    answers = exported["answers"]
    assert answers["exported"]["loss"] == pytest.approx(answers["adapter"]["loss"], abs=0.05)
    assert "as held out, loss" in newcomer.does("fineloop adapters export colours --merged --to ./again").screen


def test_a_command_of_vllm_holds_the_adapters_rank_and_base(newcomer: Person) -> None:
    adapter = json.loads((newcomer.folder / "adapter" / "adapter_config.json").read_text())
    words = shlex.split(newcomer.does("fineloop adapters serve-manifest colours --for vllm").stdout)
    serve = words.index("serve")
    options = dict(zip(words[serve + 2 :], words[serve + 3 :], strict=False))
    assert words[serve - 1 : serve + 2] == ["vllm", "serve", BASE]
    assert adapter["base_model_name_or_path"] == BASE
    assert options["--revision"] == hub.COMMIT
    # Of the choices in vllm/config/lora.py the smallest that holds it.
    assert (adapter["r"], options["--max-lora-rank"]) == (12, "16")
    name, _, folder = options["--lora-modules"].partition("=")
    newcomer.does(f"fineloop adapters pull colours@{name}")
    assert json.loads((newcomer.folder / folder / "adapter_config.json").read_text()) == adapter


def test_with_what_init_writes_the_second_night_promotes_as_well(person: Person) -> None:
    """The tiny base wants a higher rate than a real one, and learns no end; all else is as `init` wrote it."""
    build_base(person.folder / "tiny")
    rows = [json.dumps(row) + "\n" for row in colour_rows(480)]
    person.has("nights.jsonl", "".join(rows[:360]))
    tiny = "--set train.learning_rate=0.01 --set train.epochs=4 --set gate.metric=loss --set evaluate.max_new_tokens=8"
    written = person.does(f"fineloop init nights.jsonl --base tiny --no-plan --json {tiny}").answer
    assert 0 < written["power"]["fewest"] <= written["power"]["records"]
    first = person.does("fineloop run -c nights.toml --json")
    assert "a first version can be promoted" in first.screen
    person.has("nights.jsonl", "".join(rows))
    second = person.does("fineloop run -c nights.toml --json")
    assert [night.answer["promoted"] for night in (first, second)] == [True, True], second.screen
    assert second.answer["version"] != first.answer["version"]
