"""The notebook runs from top to bottom, shows pictures, and its LoRA is the one that plain diffusers loads."""

import json
import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


REPOSITORY = Path(__file__).parents[2]
NOTEBOOK = REPOSITORY / "examples" / "notebooks" / "dgpo_quickstart.ipynb"


@pytest.fixture
def kernel(tmp_path, monkeypatch) -> str:
    """A kernel of this very interpreter, on this checkout."""
    folder = tmp_path / "jupyter" / "kernels" / "this"
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (folder / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "this", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    return "this"


def outputs(cell) -> dict:
    """All that a cell shows, by its kind."""
    return {kind: data for output in cell.outputs for kind, data in output.get("data", {}).items()}


def test_it_runs_and_shows(kernel, tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = {cell.id: cell for cell in notebook.cells}
    assert cells["parameters"].metadata.tags == ["parameters"]
    cells["parameters"].source += f"\nMAX_STEPS, NUM_EVAL_PROMPTS, OUTPUT_DIR = 4, 8, {str(tmp_path / 'run')!r}"
    NotebookClient(notebook, kernel_name=kernel, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    assert not [
        output for cell in cells.values() for output in cell.get("outputs", []) if output.output_type == "error"
    ]
    for name in ("curve", "pictures", "diffusers"):
        assert len(outputs(cells[name])["image/png"]) > 1000, name
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    rewards = [entry["eval_reward"] for entry in logged if "eval_reward" in entry]
    assert rewards[-1] > rewards[0], "it does not learn"


def test_it_is_kept_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not [cell.id for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")]
    nbformat.validate(notebook)
