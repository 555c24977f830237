"""Foreign formats: the only rooms that speak other projects' names."""
