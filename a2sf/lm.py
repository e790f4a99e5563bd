"""`import a2sf.lm` registers the lm-eval model `a2sf`."""

from a2sf.evaluation.lm import PrunedLM as PrunedLM
