"""The eviction recursion and its fast versions. Knows policies, not transformers."""
