"""Policies (token-pruning methods), budgets and schedules. Imports only `a2sf.errors`."""
