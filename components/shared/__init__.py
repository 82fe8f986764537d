"""What every step shares: the config, the methods, the errors, the way to Ray."""
