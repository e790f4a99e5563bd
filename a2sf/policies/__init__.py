"""What a token-pruning method states: its numbers, and the budget they are about. Knows nothing but errors."""
