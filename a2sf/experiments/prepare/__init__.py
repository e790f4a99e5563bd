"""Before the first cell: each model and each dataset at one commit for the whole sweep, checked and fetched once."""
