"""`import a2sf.lm` registers the lm-eval model `a2sf`."""

from a2sf.scoring.lm import PrunedLM as PrunedLM
