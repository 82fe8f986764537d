"""The prepare step: rows from files become one verified, split and profiled dataset in the store."""
