"""The embedded default: problems, policy and settings of `make demo`."""
