"""What a report page holds for its script."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any


def embedded(html: Path, name: str) -> Any:
    """The data behind `charts` or `documents`."""
    found = re.search(rf'id="data-{name}">([^<]*)<', html.read_text(encoding="utf-8"))
    assert found is not None
    return json.loads(gzip.decompress(base64.b64decode(found[1])))
