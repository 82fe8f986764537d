"""What a training will take, before it is started: memory, speed and time."""
