"""Ray 2.60's own message, from a job's log; tests/ray_jobs/training/test_low_memory.py has Ray itself write one."""

from components.shared.machine import ran_low

SAID = """\
Running entrypoint for job fineloop-r-candidate-1: python -m ray_jobs.candidate --run-id r
Unexpected error occurred: 1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: \
10.0.0.7, ID: f6f28c135ab97d6d2113979eaefc07379ff951543176afa579c92e14) was 10.41GB used / 23.54GB limit (0.442091)
OOM kill reason: Memory usage 11058847744B exceeded threshold of 10110601216B (40.0% of 25276502016B limit)
Ray killed 1 worker(s) based on the killing policy
Considered workers: [
Selected to kill: (Task: job ID=01000000, task name=JobSupervisor.__init__, pid=31804, actual memory used=0.07GB)
]
To see more information about memory usage on this node, use `ray logs raylet.out -ip 10.0.0.7`
Top 10 memory users: PID\tMEM(GB)\tCOMMAND
11366\t1.53\t/usr/lib/firefox/firefox
31620\t0.43\t
31726\t0.23\tmysql -phush
22377\t0.12\tray::DashboardAgent
Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/en/latest/
"""


def test_the_node_and_what_filled_it_are_named() -> None:
    said = ran_low(SAID)
    assert said is not None
    assert said.startswith(
        "node 10.0.0.7 ran out of memory (10.41 of 23.54 GB in use), and Ray ended processes of the run there; the "
        "largest were 1.53 GB firefox (pid 11366), 0.43 GB unknown (pid 31620), 0.23 GB mysql (pid 31726). End other "
        "programs there"
    )
    assert "hush" not in said


def test_the_last_time_counts_and_the_table_may_be_missing() -> None:
    again = SAID.replace("10.0.0.7", "10.0.0.8").partition("Top 10")[0]
    said = ran_low(SAID + again)
    assert said is not None
    assert said.startswith("node 10.0.0.8 ran out of memory (10.41 of 23.54 GB in use), and Ray ended processes of the")
    assert "largest" not in said


def test_of_any_other_failure_nothing_is_said() -> None:
    assert ran_low("the node running low on disk") is None
    assert ran_low("") is None
