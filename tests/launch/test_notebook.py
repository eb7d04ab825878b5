"""launch/colab/neo_colab.ipynb runs from top to bottom on a CPU, a few steps long; its install cell decides rightly."""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import re
import subprocess
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "launch" / "colab" / "neo_colab.ipynb"


def cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text())["cells"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def tagged(tag: str) -> str:
    (found,) = [source(cell) for cell in cells() if tag in cell["metadata"].get("tags", ())]
    return found


def test_it_is_stored_without_results():
    for cell in cells():
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, source(cell)
            ast.parse(source(cell))


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """(folder, cells with outputs): everything, with STEPS = 4; then the training cell again with STEPS = 6."""
    nbformat = pytest.importorskip("nbformat", reason="the extra [notebook] is not installed")
    preprocessors = pytest.importorskip("nbconvert.preprocessors", reason="the extra [notebook] is not installed")
    for module in ("ipykernel", "gguf", "tokenizers"):
        pytest.importorskip(module)
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = nbformat.v4.new_code_cell
    (at,) = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())]
    (train,) = [cell.source for cell in notebook.cells if "neo.train.run(" in cell.source]
    notebook.cells.insert(at + 1, code("STEPS = 4"))
    notebook.cells += [code("STEPS = 6"), code(train)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("JAX_PLATFORMS", "cpu")
        for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
            patch.setenv(name, str(folder / name))
        run = preprocessors.ExecutePreprocessor(timeout=600, kernel_name="python3")
        run.preprocess(notebook, {"metadata": {"path": str(folder)}})   # raises what a cell raises
    return folder, notebook.cells


@pytest.mark.timeout(900)
def test_every_cell_runs(executed):
    folder, ran = executed
    printed = "".join(output["text"] for cell in ran for output in cell.get("outputs", ())
                      if output["output_type"] == "stream" and output["name"] == "stdout")
    for part in ("everything goes to", "bytes/token", "neo_demo: step 4 of 1200", "held-out loss", "last training loss",
                 "export/neo_demo_4.gguf"):
        assert part in printed, part
    (sampled,) = [cell.outputs for cell in ran if "model.generate" in cell.source]
    said = sampled[-1]["text"].split("-" * 80)[1:]
    assert [text.strip()[:10] for text in said] == ["def __init", "Return the"]
    assert all(len(text) > 100 for text in said)
    assert (folder / "neo_run/export/neo_demo_4.gguf").read_bytes()[:4] == b"GGUF"
    config = json.loads((folder / "neo_run/export/neo_demo_4/config.json").read_text())
    assert config["vocab_size"] == 4096 and (folder / "neo_run/export/neo_demo_4/model.safetensors").exists()


def test_the_plot_is_drawn_below_the_cell(executed):
    """One picture, replaced as the run goes on: of the records that were there when the cell ended."""
    from PIL import Image

    from neo.train.plot import loss_image
    from neo.train.workdir import read_records
    folder, ran = executed
    for steps, cell in zip((4, 6), [cell for cell in ran if "live_plot(RUN)" in cell.source], strict=True):
        (shown,) = [output["data"]["image/png"] for output in cell.outputs if output["output_type"] == "display_data"]
        records = [record for record in read_records(folder / "neo_run/run") if record["step"] <= steps]
        title = f"run: step {steps}, {steps * 1.024:.3g}K tokens"
        right = Image.open(io.BytesIO(loss_image(records, title)))
        found = Image.open(io.BytesIO(base64.b64decode(shown)))
        below_title = (0, 60, right.width, right.height)   # the title also has the speed
        assert found.crop(below_title).tobytes() == right.crop(below_title).tobytes()


def test_a_larger_number_of_steps_goes_on(executed):
    folder, _ = executed
    lines = [json.loads(line) for line in (folder / "neo_run/run/events.jsonl").read_text().splitlines()]
    assert [(line["event"], line["step"]) for line in lines if line["event"] in ("start", "resume", "finish")] == [
        ("start", 0), ("finish", 4), ("resume", 4), ("finish", 6)]


@pytest.fixture
def install_cell():
    """The names that the install cell defines (neo is there: it installs nothing)."""
    names: dict = {"SOURCE": str(ROOT)}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(tagged("install"), "install", "exec"), names)   # noqa: S102 - our own notebook
    return types.SimpleNamespace(**names, names=names)


def test_jax_is_kept_where_it_is_new_enough(install_cell):
    oldest = re.search(r'"jax>=(\d+)\.(\d+)"', (ROOT / "setup.py").read_text()).groups()
    assert tuple(map(int, oldest)) == install_cell.OLDEST_JAX
    new = {"jax": "0.11.1", "jaxlib": "0.11.1", "jax-cuda12-plugin": "0.11.1", "libtpu": "0.0.44", "numpy": "2.1"}
    assert install_cell.kept(new) == ["jax==0.11.1", "jax-cuda12-plugin==0.11.1", "jaxlib==0.11.1", "libtpu==0.0.44"]
    assert install_cell.kept(new | {"jax": "1.0"})
    assert install_cell.kept(new | {"jax": "0.9.2"}) == install_cell.kept({"numpy": "2.1"}) == []
    lines = install_cell.tested((ROOT / "constraints.txt").read_text())
    assert {re.split("==|;", line)[0] for line in lines} == {"jax", "jaxlib", "flax"} and len(lines) == 6


@pytest.mark.parametrize("there, pip_says, device, wanted", [
    ("0.11.1", [0], [], [("hf,gguf", "jax==0.11.1")]),
    ("0.9.2", [0], ["cuda"], [("hf,gguf,cuda", "jax==0.12.0.1")]),      # too old: the tested one, for this device
    ("0.11.1", [1, 0], ["tpu"], [("hf,gguf", "jax==0.11.1"), ("hf,gguf,tpu", "jax==0.12.0.1")]),   # pip cannot keep it
    ("", [1], [], [("hf,gguf", "jax==0.12.0.1")])])
def test_what_pip_is_asked_for(install_cell, tmp_path, monkeypatch, there, pip_says, device, wanted):
    asked, answers = [], list(pip_says)

    def fake(command, **_):
        asked.append((re.search(r"\[(.*)\]", command[command.index("-e") + 1]).group(1),
                      Path(command[command.index("-c") + 1]).read_text()))
        return subprocess.CompletedProcess(command, answers.pop(0))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", fake)
    monkeypatch.syspath_prepend(str(tmp_path))   # undone with what the cell adds to sys.path
    install_cell.names.update(version=lambda name: there if name in ("jax", "jaxlib") else "", accelerator=lambda: device)
    # The versions that are loaded here are not what the cell was told: after a change it asks for a restart.
    failed = pip_says[-1] != 0
    with pytest.raises(RuntimeError if failed else AssertionError, match="pip could not" if failed else "Restart session"):
        install_cell.names["install"]()
    assert [extras for extras, _ in asked] == [extras for extras, _ in wanted]
    for (_, lines), (_, line) in zip(asked, wanted, strict=True):
        assert any(one.split(";")[0].strip() == line for one in lines.splitlines()), lines


def test_a_missing_address_is_asked_for(install_cell, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    install_cell.names["SOURCE"] = "https://github.com/OWNER/neo"
    with pytest.raises(AssertionError, match="set SOURCE to the address"):
        install_cell.names["install"]()
