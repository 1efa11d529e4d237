"""Execute the notebooks from a fresh kernel each, and keep their outputs in them.

    python notebooks/execute.py [--small] [NOTEBOOK …]

With --small tasks are small and nothing is written: it is to see whether they run. The tests do the same.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import re
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).parent
#: The kernels' environment: no warning that a progress bar is drawn in text.
QUIET = {"PYTHONWARNINGS": "ignore:IProgress not found"}


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs, without when and how long each cell ran."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=1200, record_timing=False, resources={"metadata": {"path": HERE}}).execute()
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            shrink(output.get("data", {}))
    return notebook


def shrink(shown: nbformat.NotebookNode) -> None:
    """Pictures of 256 colours, which ours do not notice, take a third of the room."""
    if "image/png" in shown:
        shown["image/png"] = smaller(shown["image/png"])
    if "text/html" in shown:
        found = re.compile(r"(?<=data:image/png;base64,)[^\"]+")
        shown["text/html"] = found.sub(lambda match: smaller(match[0]), shown["text/html"])


def smaller(png: str) -> str:
    content = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(content, "PNG", optimize=True)
    return base64.b64encode(content.getvalue()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(HERE.glob("*.ipynb")))
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    os.environ |= QUIET | {"SIMFLUENCE_SMALL": "1" if options.small else ""}
    for path in options.notebooks:
        start = time.perf_counter()
        notebook = execute(path)
        if not options.small:
            nbformat.write(notebook, path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
