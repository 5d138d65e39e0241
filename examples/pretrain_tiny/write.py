"""Write the trained model into the package: python write.py OUT RENDERS DATA

fp16 weights beside open_clip_config.json, and NOTICE with author, licence and link of every set that was trained on.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import loop
from tiny import CONFIG

LIMIT = 25_000_000  # bytes on disk


def main(out: Path, renders: Path, data: Path) -> None:
    state = loop.weights(out / "settle.safetensors")
    target = CONFIG.with_name("open_clip_model.safetensors")
    save_file({k: v.to(torch.float16).contiguous() for k, v in state.items()}, target)
    target.chmod(0o644)
    assert target.stat().st_size <= LIMIT, f"{target} takes {target.stat().st_size} bytes, more than {LIMIT}"

    trained_on = {row[0] for row in json.loads((data / "train/index.json").read_text())}
    records = [json.loads(p.read_text()) for p in sorted(renders.glob("*.json"))]
    lines = [
        "clipfit-tiny was trained from scratch on pictures rendered from these icon sets, as collected by Iconify.",
        "No picture of them is in this package. The sets remain their authors' work under their licences.",
        "",
    ]
    for r in records:
        if r["prefix"] in trained_on:
            author, licence = r["author"], r["licence"]
            link = licence.get("url") or author.get("url", "")
            lines.append(f"{r['name']} ({r['prefix']}), {author['name']}, {author.get('url', '')}")
            lines.append(f"    {licence['title']} ({licence['spdx']}), {link}")
    CONFIG.with_name("NOTICE").write_text("\n".join(lines) + "\n", "utf-8")
    print(f"{target}: {target.stat().st_size} bytes; NOTICE: {len(trained_on)} sets")


if __name__ == "__main__":
    main(*(Path(a) for a in sys.argv[1:4]))
