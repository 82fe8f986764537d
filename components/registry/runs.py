"""What lies where in the folder of a run. Nobody else spells its paths.

runs/<run_id>/config.toml                  the resolved config, overrides applied
              steps/<step>.json            how each step went
              consumed.json                which data the run read
              checkpoints/step-<n>/        resumable states of the training
              metrics.jsonl                a record for each step and each measurement
              finetune.json                what the training published
              evaluation.json              the models compared, and evaluation_records.parquet record by record
              decision.json                promote, hold or skipped, with reasons
              report.html
"""

CONFIG = "config.toml"
CONSUMED = "consumed.json"
METRICS = "metrics.jsonl"
FINETUNE = "finetune.json"
EVALUATION = "evaluation.json"
EVALUATION_RECORDS = "evaluation_records.parquet"
DECISION = "decision.json"
REPORT = "report.html"
STEPS = "steps/"
CHECKPOINTS = "checkpoints/"


def run_key(run_id: str, file: str = "") -> str:
    """Where a file of the run lies in the store; without one, its folder with a slash at the end."""
    return f"runs/{run_id}/{file}"


def step_key(run_id: str, step: str) -> str:
    """Where a step's record lies."""
    return run_key(run_id, f"{STEPS}{step}.json")
