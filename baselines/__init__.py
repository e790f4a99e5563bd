"""Baseline policies, one file each. A new policy is a file here and a YAML file under conf/policy/."""
