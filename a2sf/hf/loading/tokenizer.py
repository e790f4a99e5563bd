"""A tokenizer, read from a folder and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from a2sf.compat.transformers import refused
from a2sf.errors import ConfigError
from a2sf.hf.files.paths import KEY

PROBE = "The quick brown fox jumps over the lazy dog."
BOS_KEY = "model.add_bos_token"


def read_tokenizer(
    folder: Path, path: str, *, trust_remote_code: bool = False, add_bos_token: bool | None = None
) -> Any:
    """The tokenizer whose files are in `folder`.

    Args:
        path: of the model, for messages.
        trust_remote_code: run code that comes with it.
        add_bos_token: whether it puts its beginning-of-sequence token before each text; None: as its files say.

    Raises:
        ConfigError: if it cannot be loaded, or puts no such token where it is to do so.
    """
    settings = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
    with refused(KEY, path, "its tokenizer cannot be loaded"):
        made = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True, **settings
        )
    if add_bos_token:
        check_bos(made, path, BOS_KEY)
    return made


def check_bos(tokenizer: Any, path: str, key: str) -> None:
    """Refuse a tokenizer that does not put its beginning-of-sequence token before a text.

    Args:
        path: of the model, for the message.
        key: the setting that requires that token.

    Raises:
        ConfigError: if it does not.
    """
    if tokenizer.bos_token_id is None:
        raise ConfigError(key, "true", f"the tokenizer of {path} has no beginning-of-sequence token; leave it out")
    if tokenizer.encode(PROBE)[:1] != [tokenizer.bos_token_id]:
        why = f"the tokenizer of {path} puts no beginning-of-sequence token before a text"
        raise ConfigError(key, "true", why)
