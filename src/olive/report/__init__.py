"""Terminal summary, HTML page, model card, run.json."""
