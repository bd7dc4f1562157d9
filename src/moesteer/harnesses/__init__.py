"""A steered model inside other people's test suites: lm-evaluation-harness and Inspect."""
