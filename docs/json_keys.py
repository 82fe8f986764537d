"""Top-level keys of what each command prints with --json; the tests of the command line hold them to what it prints."""

_VERSION = "name version version_uri created_at run_id aliases manifest_sha256 metrics"
_MOVE = "alias from to event_uri moved announced"
_RUN = "run_id adapter version version_uri metrics store timings_s"
_KUBEFLOW = (
    "run_id run_name state url adapter created finished recurring_run_id config_digest message decision version reasons"
    " metrics steps"
)
_PAST = "began outcome metric learning_rate note hours price"
_SCHEDULE = (
    "name recurring_run_id enabled cron kfp_cron words next time_zone overlap max_concurrency catch_up start end"
    " adapter config_digest pipeline_version_id service_account url live_runs"
)

JSON_KEYS = {
    "init": "path config plan power missing_rows bases refused",
    "run": f"{_RUN} decision verdict promoted reasons report untold",
    "train": _RUN,
    "sweep": "run_id adapter base dataset config_sha256 environment records start_loss margin best tuned comparisons"
    " verdict advised_method trials seconds picture applied",
    "plan": "method adapter scaling init base model rank learning_rate parameters trainable_parameters trainable_share"
    " memory_bytes host_memory_bytes pod_memory_bytes disk_bytes start evaluation zero_stage micro_batch_size"
    " gradient_checkpointing activation_offloading cpu_offload dense_base num_workers max_workers max_length"
    " answer_tokens device device_memory_bytes fits margin advice full_fine_tuning tokens_per_s time_s cost methods",
    "data": "profile gate base tokens positions shown unread_because refused page",
    "data audit": "audit drawn eligible file",
    "data erase": "erased users datasets versions runs unread next",
    "adapters list": "adapters name versions",
    "adapters show": f"{_VERSION} servable_as serving",
    "adapters promote": _MOVE,
    "adapters approve": _MOVE,
    "adapters rollback": _MOVE,
    "adapters check": "run_id adapter alias version against metric worse_by confidence verdict gain lower upper records"
    " needed new_records fresh held_out reasons can_roll_back moved submission_id",
    "adapters announce": "name alias version announced",
    "adapters history": "name events",
    "adapters lineage": "run_id parent config recipe dataset environment name versions",
    "adapters verify": "name version verified files",
    "adapters sign": "name version alias signature_uri signed public_key",
    "adapters revoke": "name version statement_uri public_key aliases",
    "adapters audit": "adapters findings",
    "adapters gc": "deleted bytes removals",
    "adapters pull": "path version verified base_path",
    "adapters serve-manifest": "server version manifest",
    "adapters page": "path adapters",
    "adapters export": "path version form base dtype exact parity answers tensors warnings",
    "push": "name version repository tag url",
    "chat": "name version against turns",
    "serve": "name version against",
    "compare": "runs config against_first page",
    "replay": "run_id adapter version same verdict basis_sha256 recorded reasons unsigned",
    "reproduce": "name version run_id reproduced_as same agrees differs compared",
    "compile": "path sha256 pipeline image",
    "submit": f"{_KUBEFLOW} interrupted",
    "schedule create": _SCHEDULE,
    "schedule list": "schedules",
    "schedule show": _SCHEDULE,
    "schedule update": _SCHEDULE,
    "schedule pause": _SCHEDULE,
    "schedule resume": _SCHEDULE,
    "schedule delete": "name deleted live_runs",
    "runs list": "runs",
    "runs show": f"{_KUBEFLOW} store_run_id {_PAST} report verdict next error",
    "runs stop": "run_id state stopped jobs",
    "watch": "run_id decision error",
    "reap": "stopped kept dry_run failures",
    "store up": "endpoint bucket",
    "store down": "stopped",
    "ray up": "address",
    "ray down": "stopped",
    "doctor": "ok not_seen checks",
    "completion": "shell script",
}
"""By command. Some are there only where they say something, such as `announced`."""
FREE = {
    "adapters lineage": "the whole lineage, or with --of or --tree the versions",
    "plan": "and figures of what the device makes known",
    "schema": "the JSON Schema itself",
    "store env": "each variable by its name",
    "ray env": "each variable by its name",
}
"""What is not all known by its keys."""
