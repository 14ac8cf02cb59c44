"""Plan, gates, run, resume."""
