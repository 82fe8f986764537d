"""Move the alias to a candidate that passed the gate, or leave it where it is."""
