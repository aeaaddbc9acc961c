"""Freeze the public Python API: its names and signatures, an import without torch, the quickstart, the wheel."""

import importlib.metadata
import inspect
import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import adasid

ROOT = Path(__file__).parents[2]
IMPORT = (
    "import sys, time\n"
    "started = time.perf_counter()\n"
    "import adasid\n"
    "seconds = time.perf_counter() - started\n"
    "assert seconds < 0.5, seconds\n"
    "assert not {'torch', 'numpy', 'pyarrow', 'pydantic'} & set(sys.modules), sorted(sys.modules)\n"
)
ABSENT = ("pyspark", "delta", "deltalake", "ray", "mlflow", "pandas", "matplotlib", "sklearn", "faiss")
USE = IMPORT + (
    "from importlib.util import find_spec\n"
    f"assert not [name for name in {ABSENT!r} if find_spec(name)]\n"
    "import numpy as np\n"
    "rng = np.random.default_rng(0)\n"
    "data = {'text': rng.normal(size=(60, 8)), 'behavior': rng.normal(size=(60, 4))}\n"
    "small = dict(codebook_size=4, latent_width=4, hidden=[8], decoder_hidden=[8], projector_width=8)\n"
    "tokenizer = adasid.fit('adc-sid', data, training={'epochs': 2}, progress=False, **small)\n"
    "sids = tokenizer.encode(data)\n"
    "tokenizer.save(sys.argv[1])\n"
    "assert (adasid.load(sys.argv[1]).encode(data).codes == sids.codes).all()\n"
    "print(adasid.__file__, sids.codes.shape, adasid.evaluate_codes(sids, data).items)\n"
)


def signatures(value):
    """Signatures of a function, or of a class with its public methods; properties by their type."""
    if not inspect.isclass(value):
        return str(inspect.signature(value))
    result = {"": str(inspect.signature(value))}
    for name, member in vars(value).items():
        if name.startswith("_"):
            continue
        if inspect.isfunction(member):
            result[name] = str(inspect.signature(member))
        elif function := getattr(member, "fget", None) or getattr(member, "func", None):
            result[name] = f"property -> {inspect.signature(function).return_annotation}"
    return result


def test_names_and_signatures_are_frozen():
    result = {name: signatures(getattr(adasid, name)) for name in adasid.__all__ if name != "errors"}
    kinds = {name: value for name, value in vars(adasid.errors).items() if inspect.isclass(value)}
    result["errors"] = {name: kind.exit_code for name, kind in kinds.items()}
    frozen = json.loads((Path(__file__).parent / "api.json").read_text())
    assert result == frozen, "the public API changed: say so in the README, and update tests/contracts/api.json"


def test_every_public_name_is_listed_and_documented():
    assert set(adasid.__all__) <= set(dir(adasid))
    for name in adasid.__all__:
        assert inspect.getdoc(getattr(adasid, name))
    with pytest.raises(AttributeError, match="'fitt'; its public names are CodeMetrics"):
        adasid.fitt  # noqa: B018


def test_importing_it_takes_under_half_a_second_and_no_torch():
    subprocess.run([sys.executable, "-c", IMPORT], cwd=ROOT, check=True)


def test_the_quickstart_runs_top_to_bottom(tmp_path):
    code = [sys.executable, ROOT / "docs" / "quickstart.py", tmp_path]
    done = subprocess.run(code, capture_output=True, text=True, timeout=300, env={"PYTHONPATH": str(ROOT), "PATH": ""})
    assert done.returncode == 0, done.stderr
    assert "<b0_pad>" in done.stdout and "purity of the best slot" in done.stdout and not done.stderr
    assert {path.name for path in (tmp_path / "my-tokenizer").iterdir()} == {"manifest.json", "weights.safetensors"}


def closure(names):
    """Installed distributions that ``names`` need, with themselves."""
    result, left = {}, list(names)
    while left:
        name = left.pop()
        if name in result:
            continue
        result[name] = importlib.metadata.distribution(name)
        wanted = map(Requirement, result[name].requires or [])
        left += [need.name.lower() for need in wanted if not need.marker or need.marker.evaluate({"extra": ""})]
    return result.values()


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The Python of an environment with the wheel and what it requires, and nothing else; built without a network."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    source, site = folder / "source", folder / "site"
    source.mkdir()
    for name in ("adasid", "pipelines"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    build = [*pip, "wheel", *offline, "--no-build-isolation", "-w", folder, source]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("adasid-*.whl")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", *offline, wheel], check=True, capture_output=True)
    installed = next((folder / "venv" / "lib").glob("python*/site-packages"))
    (metadata,) = importlib.metadata.distributions(name="adasid", path=[str(installed)])
    needed = [Requirement(line) for line in metadata.requires or []]
    site.mkdir()
    for distribution in closure(need.name.lower() for need in needed if "extra" not in str(need.marker)):
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    (installed / "needed.pth").write_text(str(site))
    return python


def test_the_wheel_fits_and_encodes_where_no_engine_is_installed(bare, tmp_path):
    code = [bare, "-c", USE, tmp_path / "model"]
    done = subprocess.run(code, cwd=tmp_path, capture_output=True, text=True, timeout=300, env={"PATH": ""})
    assert done.returncode == 0, done.stderr
    where, shape = done.stdout.split(" ", 1)
    assert Path(where).is_relative_to(bare.parents[1]) and shape == "(60, 5) 60\n"
