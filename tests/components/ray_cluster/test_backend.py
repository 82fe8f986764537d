"""A job's age, its Kubeflow run, and the copy of a log that two sources tell."""

import io

import pytest

from components.ray_cluster.backend import Job, LogCopy, kubeflow_run, last_lines

KFP_RUN = "3f0c1de2-9a4b-4c7d-8e5f-001122334455"


class Flushed(io.StringIO):
    """What a person has seen so far."""

    seen = ""

    def flush(self) -> None:
        self.seen = self.getvalue()


def test_nobody_waits_longer_than_the_patience_or_without_one_the_timeout() -> None:
    assert Job("r", "finetune", ("x",), 60.4).lifetime_s == 60
    assert Job("r", "finetune", ("x",), 60, patience_s=3600.6).lifetime_s == 3601


def test_the_cluster_remembers_run_task_lifetime_kubeflows_run_and_what_else_is_given() -> None:
    plain = {"fineloop_run_id": "r", "fineloop_task": "finetune", "fineloop_lifetime_s": "60"}
    assert Job("r", "finetune", ("x",), 60).about == plain
    about = Job("r", "finetune", ("x",), 60, {"fineloop_adapter": "sums"}, kfp_run_id="k").about
    assert about == {**plain, "fineloop_kfp_run_id": "k", "fineloop_adapter": "sums"}


@pytest.mark.parametrize(
    ("environment", "run_id", "found"),
    [({"KFP_RUN_ID": "k"}, KFP_RUN, "k"), ({}, KFP_RUN, KFP_RUN), ({}, "night-7", ""), ({}, f"{KFP_RUN}-2", "")],
)
def test_kubeflows_run_is_the_environments_or_a_run_id_of_kubeflows_kind(environment, run_id, found):
    assert kubeflow_run(environment, run_id) == found


def test_whole_lines_are_copied_once_and_at_once_and_the_last_one_at_the_end() -> None:
    output = Flushed()
    log = LogCopy(output)
    log.take("one\ntw")
    assert output.seen == "one\n"
    log.take("one\ntwo\nthr")
    log.take("one\ntwo\nthree", final=True)
    log.take("one\ntwo\nthree", final=True)
    assert output.seen == "one\ntwo\nthree\n"
    assert log.text == "one\ntwo\nthree"


def test_a_log_is_copied_without_colours_bars_and_the_name_of_the_worker_that_prints_our_lines() -> None:
    """As Ray 2.60 and tqdm write them."""
    worker = "\x1b[36m(RayTrainWorker pid=117, ip=10.244.0.48)\x1b[0m"
    bar = f"{worker} Converting tensors...: 12%|#2   | 35/290 [00:01<00:09, 29it/s]"
    lines = [
        f"{worker} [finetune] step 1: loss 2.1",
        bar,
        f"{bar}\r{bar.replace('12%', '100%')}",
        f"{worker} ",
        "Converting tensors...:  26%|##6       | 72/272 [00:01<00:02, 93.67it/s]",
        "\x1b[33m(RayTrainWorker pid=117)\x1b[0m a library warns",
        "at 100% of 3 workers | all of them",
        "[finetune] done",
    ]
    output = Flushed()
    log = LogCopy(output)
    log.take("\n".join(lines) + "\n")
    assert output.seen.splitlines() == [
        "[finetune] step 1: loss 2.1",
        "(RayTrainWorker pid=117) a library warns",
        "at 100% of 3 workers | all of them",
        "[finetune] done",
    ]
    assert log.text == "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("taken", "seen"),
    [
        # Another source goes on where the last one was.
        ("dashboard 1 2 2|submitter header 1 2 2|submitter header 1 2 2 new", "1 2 2 new"),
        ("dashboard lost|submitter whole", "lost whole"),
        # Repeated lines are placed by those before them.
        ("dashboard a b same|submitter a b same c same", "a b same c same"),
        # The job runs anew on a new head of the same cluster.
        ("submitter 1 2 3|submitter resumes|submitter resumes 3", "1 2 3 resumes 3"),
        # The kubelet rotates it.
        ("submitter 1 2 3 4 5 6|submitter 2 3 4 5 6 7", "1 2 3 4 5 6 7"),
    ],
)
def test_a_log_goes_on_after_what_was_copied(taken: str, seen: str) -> None:
    output = Flushed()
    log = LogCopy(output)
    for source, *lines in map(str.split, taken.split("|")):
        log.take("".join(f"{line}\n" for line in lines), source=source)
    assert output.seen.split() == seen.split()


def test_a_job_that_begins_anew_is_copied_from_its_beginning() -> None:
    output = Flushed()
    log = LogCopy(output)
    log.take("first\n")
    log.restart()
    assert log.text == ""
    log.take("2nd\n")
    assert output.seen == "first\n2nd\n"


def test_the_end_of_a_log_is_its_last_lines_that_say_something() -> None:
    assert last_lines("1\n\n2\n \n3\n", count=2) == "2\n  3"
    assert last_lines("\n \n") == ""
