"""Check the lock files: every package of setup.py, with hashes, at one version, from no particular index."""

import re
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
WHOLE = ROOT / "requirements.lock"
IMAGES = ROOT / "infra" / "images"
FILES = (WHOLE, IMAGES / "requirements.lock", IMAGES / "mlflow.lock", ROOT / "infra" / "installer.lock")
PINNED = re.compile(r"([A-Za-z0-9._-]+)(?:\[[a-z,]+\])?==(\S+)(?: ; (.+?))? \\")
HASH = re.compile(r"    --hash=sha256:[0-9a-f]{64}(?: \\)?")


def pins(path):
    """Name -> versions with their markers."""
    result = {}
    for line in path.read_text().splitlines():
        if match := PINNED.fullmatch(line):
            name, version, marker = match.groups()
            result.setdefault(canonicalize_name(name), []).append((version, marker))
    return result


def required(extras):
    """What setup.py requires, with ``extras``, from its own text: nothing is installed for this."""
    values = {}
    text = (ROOT / "setup.py").read_text().replace("find_packages(", "list(").replace("include=", "")
    code = text.replace("from setuptools import find_packages, setup", "setup = lambda **given: values.update(given)")
    exec(code, {"values": values})
    lines = [*values["install_requires"], *(line for name in extras for line in values["extras_require"][name])]
    return {canonicalize_name(need.name): need for need in map(Requirement, lines)}, values["extras_require"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_line_is_a_version_or_a_hash(path):
    lines = path.read_text().splitlines()
    for line in lines:
        assert PINNED.fullmatch(line) or HASH.fullmatch(line), line  # so no index, no address, no folder
    for line, following in zip(lines, [*lines[1:], ""]):
        assert not PINNED.fullmatch(line) or HASH.fullmatch(following), line


@pytest.mark.parametrize("path", [WHOLE, IMAGES / "requirements.lock"], ids=["setup", "images"])
def test_what_setup_py_requires_is_locked(path):
    _, extras = required(())
    needs, _ = required(extras if path == WHOLE else ("engines", "report", "s3"))
    locked = pins(path)
    for name, need in needs.items():
        assert name in locked, f"{need} is not in {path.name}: make lock"
        for version, marker in locked[name]:
            assert need.specifier.contains(version), f"{need}, but {path.name} has {version} ({marker}): make lock"


@pytest.mark.parametrize("path", FILES[1:3], ids=lambda path: path.name)
def test_images_have_the_versions_that_the_tests_run_with(path):
    whole = pins(WHOLE)
    for name, versions in pins(path).items():
        assert {version for version, _ in versions} <= {version for version, _ in whole[name]}, name


def test_each_python_gets_one_version():
    for python in ("3.10", "3.11", "3.13"):
        on = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
        on |= {"platform_machine": "x86_64", "platform_system": "Linux", "os_name": "posix"}
        for name, versions in pins(WHOLE).items():
            assert sum(marker is None or Marker(marker).evaluate(on) for _, marker in versions) <= 1, (name, python)


def test_setup_and_images_install_by_hash():
    setup = (ROOT / "infra" / "setup.sh").read_text()
    assert '--require-hashes -r "$lock"' in setup and "--no-deps --no-build-isolation -e ." in setup
    assert "$(cat setup.py infra/setup.sh infra/installer.lock $lock | sha256sum" in setup  # a new lock: a new set-up
    for name in ("spark", "mlflow"):
        assert "--require-hashes -r /tmp/requirements.lock" in (IMAGES / f"{name}.Dockerfile").read_text()
