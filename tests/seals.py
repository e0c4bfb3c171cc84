"""Files of a run that a test changes on purpose: sealed again, as if they had been written so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mtpd.files import SEAL, fingerprint_file, sealed


def edited(path: Path, **changes: Any) -> None:
    """Changes keys of a sealed JSON file."""
    content = {key: value for key, value in json.loads(path.read_text()).items() if key != SEAL}
    path.write_text(json.dumps(sealed({**content, **changes})))


def with_its_weights(heads: Path) -> None:
    """Says in the config of heads that the weights are those that lie there now."""
    edited(heads / "config.json", weights=fingerprint_file(heads / "model.safetensors"))
