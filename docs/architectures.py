"""Writes clipfit/assets/architectures.json, what `clipfit models` says of open_clip's architectures; takes minutes."""

from __future__ import annotations

import json

from clipfit.model.catalogue import KNOWN, table

if __name__ == "__main__":
    rows = (f" {json.dumps(name)}: {json.dumps(row)}" for name, row in table().items())
    KNOWN.write_text("{\n" + ",\n".join(rows) + "\n}\n", "utf-8")
