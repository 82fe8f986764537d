"""What a run leaves: its folder, and what is in it as frozen types."""
