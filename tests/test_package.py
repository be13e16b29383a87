"""What people get: the sdist, the wheel, an install without a compiler, and pages that tell the truth.

The wheel is built once, from the sdist, with the scalar path only, which is quick and gives the same bits.
TINYLLM_WHEEL names a wheel to test instead. Building and installing need a package index.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

import tinyllm
from tinyllm.server.page import FILES

ROOT = Path(__file__).resolve().parents[1]
COMPILERS = ("cc", "gcc", "clang", "c++", "g++", "clang++")
TIME_LIMIT_S = 600


def run(*command: str | Path, cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> str:
    """Runs a command and returns its stdout; fails with all it printed where it fails."""
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=TIME_LIMIT_S)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--outdir", out, ROOT)
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="session")
def source(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, unpacked."""
    folder = tmp_path_factory.mktemp("source")
    with tarfile.open(sdist) as archive:
        # Python 3.10 and 3.11 have known this only since 3.10.12 and 3.11.4.
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="session")
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if given := os.environ.get("TINYLLM_WHEEL"):
        return Path(given).resolve()
    source: Path = request.getfixturevalue("source")
    out = tmp_path_factory.mktemp("wheel")
    quick = ("-C", "cmake.define.TINYLLM_SCALAR_ONLY=ON", "-C", "cmake.define.TINYLLM_CUDA=OFF")
    run(sys.executable, "-m", "build", "--wheel", *quick, "--outdir", out, source)
    (path,) = out.iterdir()
    return path


@pytest.mark.slow
def test_sdist_has_all_that_a_build_and_the_tests_need(source: Path) -> None:
    files = {p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()}
    patterns = ("csrc/**/*", "cuda/**/*", "src/tinyllm/**/*", "tests/**/*", "examples/*.py", "docs/**/*.md")
    found = (path for pattern in patterns for path in ROOT.glob(pattern))
    wanted = {path.relative_to(ROOT).as_posix() for path in found if path.is_file()}
    built = re.compile(r"__pycache__|\.so$|/\.")
    assert {name for name in wanted if not built.search(name)} <= files
    assert {"LICENSE", "README.md", "CMakeLists.txt", "pyproject.toml"} <= files
    assert not [name for name in files if built.search(name) or name.startswith(("build/", ".venv/"))]


@pytest.mark.slow
def test_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    package = ROOT / "src" / "tinyllm"
    wanted = {f"tinyllm/{p.relative_to(package).as_posix()}" for p in package.rglob("*.py")}
    wanted |= {f"tinyllm/server/page/{name}" for name, _ in FILES.values()}
    wanted |= {"tinyllm/_core.pyi", "tinyllm/py.typed", "tinyllm/data/stories.gguf"}
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        text = archive.read(metadata).decode()
    (module,) = files - wanted - {"tinyllm/libtinyllm_cuda.so"}  # built where nvcc works
    assert re.fullmatch(r"tinyllm/_core\..*(so|pyd)", module)
    assert wanted <= files
    assert re.search(r"^Name: tinyllm-inference$", text, re.MULTILINE)
    assert "numpy<" not in text.replace(" ", "")


@pytest.mark.slow
def test_wheel_runs_where_there_is_no_compiler(wheel: Path, tmp_path: Path) -> None:
    """It also gives the same tokens as the package under test, whatever instruction set that uses."""
    venv.create(tmp_path / "venv", with_pip=True)
    scripts = tmp_path / "venv" / "bin"
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CC", "CXX")}
    env = kept | {"PATH": str(scripts)}
    assert not [name for name in COMPILERS if shutil.which(name, path=env["PATH"])]
    run(scripts / "pip", "install", "--only-binary", ":all:", "--no-compile", wheel, cwd=tmp_path, env=env)
    command = ("stories", "Once upon a time", "-n", "20", "--temp", "0", "--json")
    result = json.loads(run(scripts / "tinyllm-run", *command, cwd=tmp_path, env=env))
    with tinyllm.load("stories") as llm:
        expected = llm("Once upon a time", max_tokens=20, temperature=0)
    assert len(expected.tokens) == 20
    assert result["tokens"] == expected.tokens


@pytest.mark.slow
def test_no_compiler_is_one_paragraph_that_names_the_package(source: Path, tmp_path: Path) -> None:
    env = dict(os.environ) | {"CC": "no-such-compiler", "CXX": "no-such-compiler"}
    options = ("-C", f"build-dir={tmp_path}/build", "--outdir", tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", *options, source],
        env=env,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
        check=False,
    )
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode != 0
    assert "there is no C and C++ compiler" in said
    assert "apt-get install build-essential" in said
    assert "Traceback" not in said


def configure_cuda(folder: Path, *options: str, **env: str) -> tuple[int, str]:
    """What CMake says to cuda/ alone, in an environment of `env`."""
    folder.mkdir()
    (folder / "CMakeLists.txt").write_text(
        f"""cmake_minimum_required(VERSION 3.20)
        project(cuda_only LANGUAGES C CXX)
        add_subdirectory({ROOT}/cuda cuda)
        message(STATUS "the reason is: ${{TINYLLM_CUDA_BUILD}}")
        file(WRITE ${{CMAKE_BINARY_DIR}}/x.c "int x;")
        add_library(dummy OBJECT EXCLUDE_FROM_ALL ${{CMAKE_BINARY_DIR}}/x.c)
        target_compile_definitions(dummy PRIVATE REASON="${{TINYLLM_CUDA_BUILD}}")"""
    )
    done = subprocess.run(
        ["cmake", "-S", folder, "-B", folder / "build", "-G", "Unix Makefiles", *options],
        env={"PATH": "/usr/bin:/bin", **env},
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
        check=False,
    )
    return done.returncode, " ".join((done.stdout + done.stderr).split())


@pytest.mark.skipif(not shutil.which("cmake", path="/usr/bin:/bin"), reason="no cmake in /usr/bin")
def test_cuda_is_built_where_nvcc_works(tmp_path: Path) -> None:
    missing = "no nvcc was found in CUDA_HOME, PATH or /usr/local/cuda"
    code, said = configure_cuda(tmp_path / "a", "-DTINYLLM_NVCC=OFF")
    assert code == 0
    assert f"CUDA: not built, {missing}" in said
    assert f"the reason is: {missing}" in said
    code, said = configure_cuda(tmp_path / "b", "-DTINYLLM_NVCC=OFF", "-DTINYLLM_CUDA=ON")
    assert code != 0
    assert f"TINYLLM_CUDA=ON, but {missing}. With TINYLLM_CUDA=AUTO tinyllm is built for the CPU" in said

    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho >&2 'h.h:1: #error -- unsupported GNU version! \"$5;\"'\nexit 1\n")
    nvcc.chmod(0o755)
    home = {"CUDA_HOME": str(nvcc.parent.parent)}
    refused = f"{nvcc} does not work with /usr/bin/c++: h.h:1: #error -- unsupported GNU version!"
    code, said = configure_cuda(tmp_path / "c", **home)
    assert code == 0
    assert f"CUDA: not built, {refused}" in said
    assert f"the reason is: {refused.replace('#', '')} 5" in said, "what compiler flags can carry"
    assert "dropping" not in said
    code, said = configure_cuda(tmp_path / "d", "-DTINYLLM_CUDA=1", **home)
    assert code != 0
    assert f"TINYLLM_CUDA=1, but {refused}" in said
    code, said = configure_cuda(tmp_path / "e", "-DTINYLLM_CUDA=OFF", **home)
    assert code == 0
    assert "the reason is: TINYLLM_CUDA was OFF" in said


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
@pytest.mark.parametrize(
    ("wanted", "codes"), [("all", "sm_80 sm_86 sm_89 sm_90a sm_120? compute_80"), ("90;75;999", "sm_90a")]
)
def test_cuda_is_built_for_the_gpus_asked_for(tmp_path: Path, wanted: str, codes: str) -> None:
    nvcc = shutil.which("nvcc")
    assert nvcc is not None
    options = (f"-DTINYLLM_NVCC={nvcc}", f"-DTINYLLM_CUDA_ARCHS={wanted}")
    code, said = configure_cuda(tmp_path / "a", *options)
    assert code == 0, said
    assert "the reason is: --" in said, "there is none"
    (rules,) = tmp_path.rglob("tinyllm_cuda.dir/build.make")
    command = next(line for line in rules.read_text().splitlines() if " -shared " in line)
    known = "compute_120" in run(nvcc, "--list-gpu-arch").split()
    expected = codes.replace("sm_120?", "sm_120" if known else "").split()
    assert re.findall(r"code=(\w+)", command) == expected


README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_never_names_the_other_project() -> None:
    assert not re.search(r"pip install tinyllm", README)


def test_readme_starts_from_nothing() -> None:
    commands = re.findall(r"^.*pip install .*$", README, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        assert command.startswith("python3 -m venv .venv && . .venv/bin/activate && pip install ")


def test_lines_are_counted_as_they_are() -> None:
    page = (ROOT / "docs" / "size.md").read_text(encoding="utf-8")
    table = page.split("<!-- lines -->")[1].split("<!-- /lines -->")[0]
    now = run(sys.executable, ROOT / "tests" / "count_lines.py")
    assert table.strip() == now.strip(), "paste into docs/size.md what `python tests/count_lines.py` prints"
    sentence = now.strip().splitlines()[-1].removesuffix(".")
    assert sentence in " ".join(README.split()), "the README's sentence is the last that it prints"


@pytest.mark.parametrize("page", ["README.md", "docs/python.md", "docs/llama_cpp.md", "docs/transformers.md"])
def test_the_example_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    exec(compile(example, page, "exec"), {})
    assert capsys.readouterr().out.strip()


PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, section = link.partition("#")
        if "://" in link or "benchmarks/results" in link:  # the sdist comes without the results
            continue
        target = page.parent / name if name else page
        assert target.exists(), link
        if section:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings]
            assert section in anchors, link


def test_every_environment_variable_is_documented() -> None:
    read = re.compile(r"""(?:environ(?:\.get\(|\[)|getenv\()\s*["'](\w+)""")
    suffixes = {".py", ".c", ".h", ".cpp", ".cu", ".cuh", ".inc"}
    used: set[str] = set()
    for folder in ("src", "csrc", "cuda", "tests", "benchmarks", "examples"):
        for path in (p for p in (ROOT / folder).rglob("*") if p.suffix in suffixes):
            names = set(read.findall(path.read_text(encoding="utf-8")))
            users = folder in ("src", "csrc", "cuda") and path.parent.name != "check"
            used |= names if users else {n for n in names if "TINYLLM" in n}
    assert used >= {"TINYLLM_ISA", "NO_COLOR", "TINYLLM_TEST_DATA"}, "the search finds what is there"
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    table = re.search(r"\| variable \| what it does \|\n(?:\|.*\n)+", page)
    assert table
    assert set(re.findall(r"`([A-Z_]{3,})\b", table[0])) == used
