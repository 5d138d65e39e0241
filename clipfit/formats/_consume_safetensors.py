"""A consumer of a self-describing weight file: writes it as a folder that open_clip loads.

    python _consume_safetensors.py FILE FOLDER

Needs safetensors and torch alone. A tokenizer of the transformers library lies beside it, in the folder tokenizer.
"""

import json
import shutil
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file


def main(file: str, folder: Path) -> None:
    with safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()["clipfit"])
        state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    folder.mkdir(exist_ok=True)
    config = {key: about["pretrained"][key] for key in ("model_cfg", "preprocess_cfg")}
    (folder / "open_clip_config.json").write_text(json.dumps(config), "utf-8")
    save_file(state, folder / "open_clip_model.safetensors")
    if (tokenizer := Path(file).parent / "tokenizer").is_dir():
        shutil.copytree(tokenizer, folder, dirs_exist_ok=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
