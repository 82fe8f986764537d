"""The adapter registry on a store: versions, aliases, the log of what happened to them, and what vouches for each."""
