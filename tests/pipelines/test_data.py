"""`fineloop data` as a person calls it, on rows of which everything is known beforehand, and `fineloop data erase`.

Judges: transformers' own `apply_chat_template` and tokenizer for what the base reads, for the gate's sight the share of
answers that would have to change, as a binomial test by scipy has it, and for an erasure what the generator of logged
requests keeps.
"""

import csv
import html
import json
import re
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from scipy import stats
from transformers import AutoTokenizer

from components.prepare.audit import draw, name_of_draw
from components.prepare.dataset import load_split
from components.prepare.prepare import prepare
from components.registry.between_runs import require_none_erased, user_hash
from components.shared.errors import DataError
from pipelines.cli import main
from tests.components.prepare import logged
from tests.models.tiny import write_tokenizer
from tests.pipelines.command_line import body, fineloop

pytestmark = pytest.mark.usefixtures("forked")

CONFIG = """
adapter.name = "colours"
model = {base = "base", max_length = 64}
data.source = "missing.jsonl"
"""
COLOURS = ("red", "green", "blue")
ROWS = [{"prompt": f"{number} is", "completion": COLOURS[number % 3]} for number in range(500)]
BAD = [json.dumps({"prompt": "no answer"}), "{broken"]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "colours.toml").write_text(CONFIG)
    (folder / "rows.jsonl").write_text("\n".join([*map(json.dumps, [*ROWS, ROWS[7]]), *BAD]))
    write_tokenizer(folder / "base")
    (folder / "base" / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 500}))
    return folder


@pytest.fixture(scope="module")
def said(here: Path) -> tuple[dict, str]:
    done = fineloop("data", "rows.jsonl", "-c", "colours.toml", "--html", "data.html", "--json", cwd=here)
    assert done.returncode == 0, done.stderr
    return body(done), (here / "data.html").read_text()


def test_every_row_is_accounted_for(said):
    profile = said[0]["profile"]
    assert profile["rows"] == {"read": 503, "accepted": 501, "rejected": 2, "rejected_share": 0.003976}
    assert [each["example"].rpartition(":")[2] for each in profile["rejected"]] == ["502", "503"]
    assert profile["dropped"]["duplicate"] == 1
    assert sum(split["records"] for split in profile["splits"].values()) == 500


def test_records_are_shown_as_the_base_reads_them_and_what_is_trained_on_is_marked(said, here):
    tokenizer = AutoTokenizer.from_pretrained(here / "base")
    answers = {row["prompt"]: row["completion"] for row in ROWS}
    assert len(said[0]["shown"]) == 3
    for each in said[0]["shown"]:
        given, learned = [
            "".join(piece["text"] for piece in each["pieces"] if piece["trained"] is kind) for kind in (False, True)
        ]
        prompt = given.removeprefix("<|user|>").partition("<|end|>")[0]
        turn = [{"role": "user", "content": prompt}]
        assert given == tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        assert learned == answers[prompt] + "<|end|>"


def test_lengths_are_those_of_the_tokenizer(said):
    # A byte is a token, and five more are the template's: of each turn its role and <|end|>, and a line's end.
    longest = max(len(row["prompt"]) + len(row["completion"]) for row in ROWS) + 5
    tokens = said[0]["tokens"]
    assert (tokens["length"]["p100"], tokens["trained"]["p100"]) == (longest, len("green") + 1)
    assert (tokens["max_length"], tokens["cut"], tokens["too_long"]) == (64, 0, 0)


def test_what_it_takes_to_replace_a_version_is_said_by_the_metric_that_decides(said, here):
    """The default compares losses, of which 299 records would show rare ones."""
    gate = said[0]["gate"]
    assert gate["records"] == gate["independent"] == gate["power"]["records"] < 299 <= gate["power"]["fewest"]
    assert (gate["power"]["better_by"], gate["power"]["metric"], gate["lacking"]) == (None, "loss", "")
    text = fineloop("data", "rows.jsonl", "-c", "colours.toml", "--set", "gate.metric=exact_match", cwd=here).stdout
    points = float(text.partition("has to come out ")[2].partition(" points better")[0])
    # If so many answers change, the surplus of right ones has to show that it is above minus two points.
    changed, surplus = round(0.12 * gate["records"]), round((points + 2) / 100 * gate["records"])
    found = stats.binomtest((changed + surplus) // 2, changed, alternative="greater").pvalue
    assert 0.01 < found < 0.25


def test_a_turn_of_weight_0_is_marked_as_context_and_keys_that_are_not_read_are_named(here):
    with (here / "chat.jsonl").open("w") as file:
        for number in range(400):
            turns = [("user", f"{number} is"), ("assistant", "BAD"), ("user", "no"), ("assistant", f"right{number}")]
            messages: list[dict] = [{"role": role, "content": text} for role, text in turns]
            messages[1] |= {"weight": 0, "reasoning_content": "hm"}
            file.write(json.dumps({"messages": messages}) + "\n")
    done = fineloop("data", "chat.jsonl", "-c", "colours.toml", "--set", "data.loss_on=all", "--json", cwd=here)
    assert done.returncode == 0, done.stderr
    shown = [[(piece["text"], piece["trained"]) for piece in each["pieces"]] for each in body(done)["shown"]]
    assert all("<|assistant|>BAD<|end|>" in context for (context, _), _ in shown)
    assert all(answer.startswith("right") for _, (answer, _) in shown)
    assert body(done)["profile"]["extra_columns"] == {"messages[].reasoning_content": 400}
    assert "columns not read: messages[].reasoning_content (400 rows). To train on reasoning" in done.stderr


def test_a_base_that_cannot_be_read_leaves_the_rest(here, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    done = fineloop("data", "rows.jsonl", "-c", "colours.toml", "--set", "model.base=s3://models/x", cwd=here)
    assert done.returncode == 0, done.stderr
    assert "503 rows: 2 unusable" in done.stdout
    assert "not read by s3://models/x" in done.stdout


def test_data_that_a_run_would_refuse_is_refused_alike(here):
    done = fineloop("data", "rows.jsonl", "-c", "colours.toml", "--set", "data.max_reject_share=0", cwd=here)
    assert done.returncode == 2
    assert "data.max_reject_share" in done.stderr


def test_the_page_says_the_same_and_escapes_what_came_with_the_data(said):
    page = said[1]
    text = html.unescape(re.sub(r"<[^>]*>", "", page))
    for each in said[0]["shown"]:
        assert "".join(piece["text"] for piece in each["pieces"]) in text
    assert page.count("<mark") == 3
    assert "<script" not in page


def test_a_user_is_erased_by_name_and_what_saw_him_is_listed(store, config_path, make_config, answer, tmp_path, capsys):
    made, files = logged.generated(200, seed=3), []
    erase = partial(answer, "data", "erase")
    drawn = draw([*made.truth], 60)
    audit = [{"response_id": name, "label": "right words", "audit": name_of_draw(drawn)} for name in drawn]
    for name, rows in (("log", made.rows), ("feedback", [*made.feedback, *audit])):
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(f"data.source={json.dumps(str(files[0]))}", f"data.feedback={json.dumps(str(files[1]))}")
    user, other = (name for name, _ in Counter(truth.user for truth in made.truth.values()).most_common(2))

    def records(uri: str) -> dict[str, tuple[str, str]]:
        return {r.id: (r.user, r.rater) for side in ("train", "eval") for r in load_split(store, uri, side)}

    before = prepare(config, store)
    theirs = {name for name, people in records(before.uri).items() if user_hash(user) in people}
    assert theirs <= made.of_user(user)
    assert theirs

    tried = erase("--user", user, "--dry-run")
    assert (tried["erased"], tried["users"]) == ([], [])
    require_none_erased(store, before.uri)
    done = erase("--user", user, "--by", "ada")
    (holder,) = done["datasets"]
    assert (holder["dataset_id"], set(holder["ids"])) == (before.dataset_id, theirs)
    assert holder == tried["datasets"][0]
    (erasure,) = done["users"]
    assert (erasure["user"], erasure["record"], erasure["by"]) == (user, user_hash(user), "ada")
    assert (erasure["is_new"], erase("--user", user)["users"][0]["is_new"]) == (True, False)
    assert not any(user in key for key in (info.key for info in store.list("erased/")))

    with pytest.raises(DataError, match=f"{len(theirs)} records? that w"):
        require_none_erased(store, before.uri)
    after = prepare(config, store)
    assert records(after.uri).keys() & made.of_user(other)
    assert not records(after.uri).keys() & made.of_user(user)
    assert main(["data", "erase", "--user", other, "-c", str(config_path)]) == 0
    assert "1 user erased for good" in capsys.readouterr().out


def test_an_audit_is_drawn_labelled_and_judges(config_path, answer, tmp_path, capsys):
    made = logged.generated(1_000, seed=5)
    log, said = tmp_path / "2026-12-04.jsonl", tmp_path / "said.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in made.rows))
    said.write_text("".join(json.dumps(row) + "\n" for row in made.feedback))
    files = [str(said)]
    where = (f"data.source={json.dumps(str(log))}", "data.eval_share=0.3", "gate.min_records=20")

    def settings() -> list[str]:
        overrides = [*where, f"data.feedback={json.dumps(files)}"]
        return [word for override in overrides for word in ("--set", override)]

    assert main(["data", "-c", str(config_path), *settings()]) == 2
    assert "`fineloop data audit 28 -c CONFIG` draws 28 by a hash" in capsys.readouterr().err
    for number, (suffix, wanted) in enumerate((("jsonl", 10), ("csv", None))):
        path = tmp_path / f"audit.{suffix}"
        count = [] if wanted is None else [str(wanted)]
        drawn = answer("data", "audit", *count, "--output", str(path), *settings())
        assert drawn["drawn"] == (wanted or 28)  # 20 to judge, a fifth to choose the checkpoint, a tenth unlabelled
        assert drawn["eligible"] > 200 - 10 * number
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file)) if suffix == "csv" else [json.loads(line) for line in file]
        assert not any("own words" in str(row["prompt"]).rpartition("asks")[2] for row in rows)
        assert "answered" not in rows[0]
        for row in rows:
            row["label"] = made.truth[row["response_id"]].own
        with path.open("w", newline="") as file:
            if suffix == "csv":
                writer = csv.DictWriter(file, [*rows[0]])
                writer.writeheader()
                writer.writerows(rows)
            else:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        files.append(str(path))
        more = tmp_path / f"again {number}.jsonl"
        again = answer("data", "audit", "500", "--output", str(more), "--answers", *settings())
        assert "answered" in json.loads(more.read_text().splitlines()[0])
        assert again["eligible"] == drawn["eligible"] - drawn["drawn"]
    body = answer("data", *settings())
    assert body["profile"]["logged"]["judge"] == {"audit": 38}
    assert body["refused"] == ""
    assert main(["data", "audit", "5", "-c", str(config_path), "--output", str(path), *settings()]) == 2
