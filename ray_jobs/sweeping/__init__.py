"""Sweeps of learning rates and methods: which trainings to try, how they share a base, what is made of their losses."""
