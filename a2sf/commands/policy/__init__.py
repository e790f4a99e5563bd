"""Commands about policies: the list of them, their invariants, settings and heads found on plain text, their errors."""
