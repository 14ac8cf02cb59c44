"""The store of step results, addressed by what made them, and the journal of a step in progress."""
