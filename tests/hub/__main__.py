"""`python -m tests.hub STORE [PORT]` serves a store's repositories until interrupted and prints each request."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tests.hub.server import Hub
from tests.hub.store import Store

with Hub(Store(Path(sys.argv[1])), int(sys.argv[2]) if len(sys.argv) > 2 else 0) as hub:
    print(f"export HF_ENDPOINT={hub.url}", flush=True)
    while True:
        time.sleep(0.5)
        for line in hub.requests():
            print(line, flush=True)
