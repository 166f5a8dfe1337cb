"""Make tests/assets/debug, the data of train_configs/debug.toml, from this repository's sources.

python tests/assets/make_debug_data.py
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as corpus:
        for path in sorted(p for folder in ("memdlm_dist", "tools", "tests") for p in (ROOT / folder).rglob("*.py")):
            if path.stat().st_size:
                corpus.write(json.dumps({"text": path.read_text()}) + "\n")
        corpus.flush()
        command = [
            sys.executable,
            ROOT / "tools/prepare_data.py",
            "--input",
            corpus.name,
            "--train-tokenizer",
            "512",
        ]
        options = [
            "--seq-len",
            "128",
            "--held-out",
            "0.2",
            "--overwrite",
            "--output",
            ROOT / "tests/assets/debug",
        ]
        subprocess.run([*command, *options], check=True)


if __name__ == "__main__":
    main()
