"""Baseline policies, one file each. Adding a file here and its YAML under conf/policy/ adds a policy."""
