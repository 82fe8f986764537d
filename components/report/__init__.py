"""The report: one self-contained page that says what a run did, what was decided and why."""
