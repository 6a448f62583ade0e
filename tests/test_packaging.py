"""The package works from a wheel, an editable install and a bare checkout, and ships what it should.

Builds happen in copies of the checkout and without a network. Programs run in an environment of their own that has the
dependencies but not this package, since an editable install around the tests would hide a file that a wheel lacks.
"""

import configparser
import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOP_LEVEL = {
    ".ci",
    ".gitignore",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "README.md",
    "examples",
    "gmn_optim",
    "pretrained",
    "pyproject.toml",
    "setup.cfg",
    "tests",
}

# What a user does first, and where the package came from.
USE_PACKAGE = """
import json
import gmn_optim
from gmn_optim.tasks.datasets import load_fashion_mnist_8x8

images = load_fashion_mnist_8x8().train_images
print(json.dumps([gmn_optim.__file__, gmn_optim.__version__, list(images.shape), sorted(gmn_optim.list_weights())]))
"""


def settings() -> configparser.ConfigParser:
    """Return what setup.cfg says."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def ignored_patterns() -> list[str]:
    """Return the patterns of .gitignore, without the slash that marks a folder."""
    lines = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    return [line.rstrip("/") for line in lines]


def shipped_weights() -> list[str]:
    """Return the names of the cards in the checkout."""
    return sorted(path.stem for path in (ROOT / "pretrained").glob("*.json"))


def run(python: Path, *arguments: str, cwd: Path, **variables: str) -> str:
    """Run Python, without the caller's settings for Python and pip, and return what it wrote.

    Raises:
        AssertionError: it failed; the message has its error output, unlike that of ``CalledProcessError``.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
    result = subprocess.run(
        [python, *arguments],
        check=False,
        cwd=cwd,
        env=kept | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f"{' '.join(arguments)}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def pip(python: Path, *arguments: str, cwd: Path) -> None:
    """Run pip without a network."""
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
    run(python, "-m", "pip", *arguments, *options, cwd=cwd)


def copy_checkout(target: Path) -> Path:
    """Copy the checkout without what builds and runs left behind; an old build/ would hide missing files."""
    target.mkdir()
    for name in TOP_LEVEL:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns(*ignored_patterns()))
        else:
            shutil.copy2(source, target / name)
    return target


def assert_works(output: str, folder: Path) -> None:
    """Check what :data:`USE_PACKAGE` printed, and that the package lies below ``folder``."""
    file, version, shape, weights = json.loads(output)
    assert Path(file).resolve().is_relative_to(folder.resolve()), f"imported from {file}"
    assert version == re.search(r'__version__ = "(.+)"', (ROOT / "gmn_optim" / "version.py").read_text())[1]
    assert shape == [60000, 64]
    assert weights == shipped_weights()


@pytest.fixture(scope="module", name="python")
def fixture_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the interpreter of a new environment that sees the installed dependencies, but not this package.

    Folders named in a .pth file are searched, while .pth files inside them (as of an editable install) are not read.
    """
    folder = tmp_path_factory.mktemp("environment")
    builder = venv.EnvBuilder(with_pip=False, symlinks=os.name != "nt")
    builder.create(folder)
    python = Path(builder.ensure_directories(folder).env_exe)
    own = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    installed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (Path(own) / "dependencies.pth").write_text("\n".join(installed), encoding="utf-8")
    return python


@pytest.fixture(scope="module", name="wheel")
def fixture_wheel(tmp_path_factory: pytest.TempPathFactory, python: Path) -> Path:
    """Return a wheel built from a copy of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    copy_checkout(folder / "checkout")
    pip(python, "wheel", "--wheel-dir", str(folder), str(folder / "checkout"), cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_wheel_works(python: Path, wheel: Path, tmp_path: Path) -> None:
    """Unpacked into an empty folder, the wheel has all that its code reads."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "unpacked")
    output = run(python, "-c", USE_PACKAGE, cwd=tmp_path, PYTHONPATH=str(tmp_path / "unpacked"))
    assert_works(output, tmp_path / "unpacked")


def test_bare_checkout_works(python: Path, tmp_path: Path) -> None:
    """Nothing is installed; the checkout is on the path and the working directory is elsewhere."""
    output = run(python, "-c", USE_PACKAGE, cwd=tmp_path, PYTHONPATH=str(ROOT), PYTHONDONTWRITEBYTECODE="1")
    assert_works(output, ROOT)


def test_editable_install_works(python: Path, tmp_path: Path) -> None:
    """An editable install of a copy finds both folders of the copy."""
    checkout = copy_checkout(tmp_path / "checkout")
    pip(python, "install", "--editable", str(checkout), cwd=tmp_path)
    try:
        assert_works(run(python, "-c", USE_PACKAGE, cwd=tmp_path), checkout)
    finally:
        run(python, "-m", "pip", "uninstall", "--yes", "--quiet", "gmn_optim", cwd=tmp_path)


def test_wheel_holds_the_expected_files(wheel: Path) -> None:
    """All modules, weights and data; no tests, no examples, nothing left behind by a run."""
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "gmn_optim").rglob("*.py")}
    weights = {f"gmn_optim/pretrained/{path.name}" for path in (ROOT / "pretrained").glob("*.*") if path.is_file()}
    data = {path.relative_to(ROOT).as_posix() for path in (ROOT / "gmn_optim" / "tasks" / "data").glob("*.npz")}
    data.add("gmn_optim/tasks/data/NOTICE.md")
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    documents = {name for name in weights if name.endswith(".md")}
    assert found == (modules | weights | data) - documents


def test_wheel_describes_itself(wheel: Path) -> None:
    """Licence texts, the command and the README travel along."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" in name]
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith("/METADATA"))
        (commands,) = (archive.read(name).decode() for name in names if name.endswith("/entry_points.txt"))
    assert any(name.endswith("/LICENSE") for name in names)
    assert any(name.endswith("/NOTICE.md") for name in names)
    assert (ROOT / "README.md").read_text(encoding="utf-8").strip() in metadata.replace("\r\n", "\n")
    assert "gmn-optim = gmn_optim.cli:main" in commands


def test_every_package_is_listed() -> None:
    """``packages`` in setup.cfg names each folder that holds modules."""
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "gmn_optim").rglob("*.py")}
    expected = {".".join(folder.parts) for folder in folders} | {"gmn_optim.pretrained"}
    assert set(settings()["options"]["packages"].split()) == expected


def test_import_loads_the_inference_half_only(python: Path, tmp_path: Path) -> None:
    """``import gmn_optim`` stays light: no tasks, no meta-training, no plots."""
    program = "import sys, gmn_optim; print(*sys.modules)"
    modules = run(python, "-c", program, cwd=tmp_path, PYTHONPATH=str(ROOT), PYTHONDONTWRITEBYTECODE="1").split()
    unwanted = ("gmn_optim.tasks", "gmn_optim.metatrain", "gmn_optim.testing", "gmn_optim.cli", "matplotlib")
    assert [name for name in modules if f"{name}.".startswith(tuple(f"{prefix}." for prefix in unwanted))] == []


def test_pyproject_only_names_the_build_system() -> None:
    """All metadata stay in setup.cfg."""
    assert len((ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()) <= 3


def test_top_level_holds_only_the_agreed_names() -> None:
    """What git ignores may lie around; anything else is a stray file."""
    patterns = [".git", *ignored_patterns()]
    found = {path.name for path in ROOT.iterdir() if not any(fnmatch.fnmatch(path.name, p) for p in patterns)}
    assert found == TOP_LEVEL


def test_readme_has_one_test_command() -> None:
    """.ci/run runs this line of the README; tests and their tools come from the extra that it names."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    commands = [line for line in lines if re.fullmatch(r"pip install .*python -m pytest", line)]
    assert commands == ['pip install torch==2.13.0 && pip install -e ".[test,integrations]" && python -m pytest']


def test_ci_script_is_executable() -> None:
    """The script runs by its name."""
    script = ROOT / ".ci" / "run"
    assert script.read_text(encoding="utf-8").startswith("#!/usr/bin/env bash\n")
    assert os.name == "nt" or os.access(script, os.X_OK)
