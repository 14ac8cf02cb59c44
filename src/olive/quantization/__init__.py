"""The mathematics of quantisation. Depends on nothing of ours."""
