"""The notebook runs from its first to its last cell."""

import pytest
from conftest import BUNDLE, PATIENCE, ROOT

pytestmark = pytest.mark.newest
NOTEBOOK = ROOT / "examples/python/eqim.ipynb"


def test_the_notebook_runs(monkeypatch, tmp_path):
    import nbformat
    from nbclient import NotebookClient

    # The kernel is that of this interpreter, and writes nothing into the home of the user.
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("EQIM_BUNDLE", str(BUNDLE))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(not cell.outputs and cell.execution_count is None for cell in code), "outputs are stripped"
    client = NotebookClient(notebook, timeout=PATIENCE, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    pictures = [output for cell in code for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 4
