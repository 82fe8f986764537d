"""Argo's question whether a step is run again, answered by the rule that infra/kubeflow gives it."""

import re
from typing import NamedTuple

import yaml

from infra.checks.manifests import INFRA

RULE = INFRA / "kubeflow/pipelines/lost-steps.yaml"


class Ended(NamedTuple):
    """How Argo saw a step's attempt end."""

    status: str
    exit_code: str
    message: str


def is_run_again(ended: Ended) -> bool:
    """What the expression of the rule says."""
    patch = yaml.safe_load(RULE.read_text(encoding="utf-8"))
    strategy = yaml.safe_load(patch["data"]["workflowDefaults"])["spec"]["templateDefaults"]["retryStrategy"]
    assert strategy["retryPolicy"] == "Always"  # another would let the expression see less
    # Three words of the language that Argo has its expressions in, expr-lang, are others in Python.
    words = {r"lastRetry\.(\w+)": r"\1", r"asInt\((\w+)\)": r"int(\1)", r"(\w+) matches\s+('[^']*')": r"search(\2, \1)"}
    expression = strategy["expression"].replace("||", "or").replace("&&", "and")
    for theirs, ours in words.items():
        expression = re.sub(theirs, ours, expression)
    known = {"status": ended.status, "exitCode": ended.exit_code, "message": ended.message}
    return bool(eval(expression, {"__builtins__": {}}, {**known, "search": re.search, "int": int}))
