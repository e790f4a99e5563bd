"""The hub: its repositories at one commit, and its errors as sentences."""
