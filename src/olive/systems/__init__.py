"""Where a job runs: one contract, one worker."""
