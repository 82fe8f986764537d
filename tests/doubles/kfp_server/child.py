"""The process of one run: the submitted YAML under kfp.local, each step a process of its own.

python -m tests.doubles.kfp_server.child FOLDER RUN_ID PYTHON
"""

import json
import os
import sys
import types
import warnings
from pathlib import Path


def main(folder: Path, run_id: str, python: str) -> None:
    """Run FOLDER/pipeline.yaml with FOLDER/parameters.json, its steps by this Python; outputs go to FOLDER/outputs."""
    sys.executable = python
    (folder / "pid").write_text(str(os.getpid()))
    warnings.simplefilter("ignore")
    from kfp import components, local
    from kfp.local import pipeline_orchestrator, placeholder_utils

    # kfp.local makes up an id of its own; on a cluster steps see the run's.
    named = {**vars(placeholder_utils), "make_random_id": lambda: run_id}
    pipeline_orchestrator.placeholder_utils = types.SimpleNamespace(**named)
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(folder / "outputs"))
    pipeline = components.load_component_from_file(str(folder / "pipeline.yaml"))
    pipeline(**json.loads((folder / "parameters.json").read_text()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
