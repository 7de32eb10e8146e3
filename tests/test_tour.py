"""The notebook is its script, holds what its cells printed, and runs."""

import json
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
NOTEBOOK = json.loads((DOCS / "tour.ipynb").read_text(encoding="utf-8"))


def script_cells() -> list[tuple[str, str]]:
    """(kind, text) of every cell of docs/tour.py, in the percent format."""
    found = []
    for part in (DOCS / "tour.py").read_text(encoding="utf-8").split("# %%")[1:]:
        first, _, text = part.partition("\n")
        if "[markdown]" in first:
            lines = [line.removeprefix("#").removeprefix(" ") for line in text.strip().splitlines()]
            found.append(("markdown", "\n".join(lines)))
        else:
            found.append(("code", text.strip()))
    return found


def test_the_notebook_is_its_script():
    assert [(c["cell_type"], "".join(c["source"]).strip()) for c in NOTEBOOK["cells"]] == script_cells()


def test_the_notebook_holds_what_its_cells_printed():
    """The whole of it, small, without an error, a warning or a path of the machine that made it."""
    code = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
    assert all(output.get("name", "stdout") == "stdout" for output in outputs)
    text = json.dumps(outputs)
    assert "reward 1" in text and "bare" in text and "/home/" not in text and "/tmp" not in text
    assert len(text) < 400_000


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch, tmp_path):
    """With fewer steps, in a kernel of its own."""
    nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel")
    pytest.importorskip("ipykernel", reason="pip install nbclient ipykernel")
    nbformat = pytest.importorskip("nbformat", reason="comes with nbclient")
    monkeypatch.setenv("TOUR_STEPS", "1")
    monkeypatch.setenv("TOUR_COUNT", "4")
    notebook = nbformat.read(DOCS / "tour.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": DOCS}}).execute()
    figures = [
        o for cell in notebook.cells for o in cell.get("outputs", ()) if o.output_type == "display_data"
    ]
    assert len(figures) == 3
