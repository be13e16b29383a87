#!/usr/bin/env python3
"""All wheels and the sdist, on one Linux machine, without containers: zig, a package of the index, is the
compiler.

    python -m venv .venv && .venv/bin/pip install -r .ci/wheels.txt
    .venv/bin/python .ci/wheels.py                        all of it into dist/
    .venv/bin/python .ci/wheels.py --only manylinux_2_17_x86_64 --python 3.11
    .venv/bin/python .ci/wheels.py --headers 3.12=/opt/python3.12/include/python3.12
    .venv/bin/python .ci/wheels.py --run                  and run two of them, the ARM one under qemu-user
    .venv/bin/python .ci/wheels.py --list                 what can be built here, and what not

The C core knows no Python, so it is compiled once a platform; the binding, once a platform and Python. A
Python's headers come from --headers, else from an interpreter of that version (in PATH, pyenv's, uv's), else
from Debian's packages, which are unpacked, not installed. What cannot be built is named, and the exit code
is 1.
docs/decisions/0014-wheels.md has the reasons.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
DEBIAN = ("bookworm", "trixie", "sid")  # whose packages may have a Python's headers
EPOCH = "315532800"  # 1980-01-01, the earliest that a zip file can say


@dataclass(frozen=True)
class Platform:
    """target: zig's name of it. soabi: how its Python marks modules, after the version."""

    tag: str
    target: str
    system: str
    processor: str
    soabi: str


PLATFORMS = (
    Platform("manylinux_2_17_x86_64", "x86_64-linux-gnu.2.17", "Linux", "x86_64", "x86_64-linux-gnu"),
    Platform("manylinux_2_17_aarch64", "aarch64-linux-gnu.2.17", "Linux", "aarch64", "aarch64-linux-gnu"),
    Platform("musllinux_1_2_x86_64", "x86_64-linux-musl", "Linux", "x86_64", "x86_64-linux-musl"),
    Platform("musllinux_1_2_aarch64", "aarch64-linux-musl", "Linux", "aarch64", "aarch64-linux-musl"),
    Platform("macosx_11_0_x86_64", "x86_64-macos.11.0", "Darwin", "x86_64", "darwin"),
    Platform("macosx_11_0_arm64", "aarch64-macos.11.0", "Darwin", "arm64", "darwin"),
)


class CannotError(Exception):
    """A target that cannot be built here, and why."""


def run(*command: str | Path, cwd: Path = ROOT, **env: str) -> str:
    """Its stdout; CannotError with the end of what it said where it fails."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=os.environ | env, capture_output=True, text=True
    )
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise CannotError(f"{Path(command[0]).name} ended with {done.returncode}:\n{said}")
    return done.stdout


# ---- the Python part


def sdist(out: Path, work: Path) -> Path:
    """The sdist, made twice: the same bytes, or CannotError."""
    made = []
    for name in ("first", "second"):
        folder = work / f"sdist-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        build = (sys.executable, "-m", "build", "--no-isolation")
        run(*build, "--sdist", "--outdir", folder, ROOT, SOURCE_DATE_EPOCH=EPOCH)
        made += list(folder.iterdir())
    if made[0].read_bytes() != made[1].read_bytes():
        raise CannotError("the sdist is another one each time")
    return Path(shutil.copy(made[0], out))


def python_part(archive: Path, work: Path) -> Path:
    """A wheel of all but the built module, by the build backend itself, unpacked."""
    for name in ("pure", "python"):
        shutil.rmtree(work / name, ignore_errors=True)
    shutil.unpack_archive(archive, work / "pure")
    (source,) = (work / "pure").iterdir()
    options = ("-C", "wheel.cmake=false", "--outdir", work / "pure")
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", *options, source, SOURCE_DATE_EPOCH=EPOCH)
    (wheel,) = (work / "pure").glob("*.whl")
    with zipfile.ZipFile(wheel) as pure:
        pure.extractall(work / "python")
    return work / "python"


def assemble(python: Path, module: Path, version: str, platform: Platform, out: Path) -> Path:
    """A wheel of the Python part and one module."""
    from wheel.wheelfile import WheelFile

    (info,) = python.glob("*.dist-info")
    tag = f"cp{version.replace('.', '')}"
    name = f"{info.stem}-{tag}-{tag}-{platform.tag}.whl"
    facts = (
        "Wheel-Version: 1.0\nGenerator: tinyllm .ci/wheels.py\nRoot-Is-Purelib: false\n"
        f"Tag: {tag}-{tag}-{platform.tag}\n"
    )
    os.environ["SOURCE_DATE_EPOCH"] = EPOCH  # the time of every entry
    with WheelFile(out / name, "w") as wheel:
        for path in sorted(p for p in python.rglob("*") if p.is_file()):
            inside = path.relative_to(python).as_posix()
            if path.name != "RECORD":  # WheelFile writes it
                wheel.writestr(inside, facts if path == info / "WHEEL" else path.read_bytes())
        wheel.writestr(
            f"tinyllm/_core.cpython-{version.replace('.', '')}-{platform.soabi}.so", module.read_bytes()
        )
    return out / name


# ---- headers


def headers(version: str, given: dict[str, Path], work: Path) -> Path:
    """The folder of a Python's Python.h. Headers are the same on every platform but for pyconfig.h, of which
    they read sizes and features that all our platforms share."""
    folder = given.get(version) or _of_interpreter(version) or _of_debian(version, work)
    text = (folder / "patchlevel.h").read_text() if (folder / "patchlevel.h").is_file() else ""
    found = re.search(r'PY_VERSION\s+"(\d+\.\d+)', text)
    if not found or found[1] != version:
        raise CannotError(f"{folder} has no headers of Python {version}")
    return folder


def _of_interpreter(version: str) -> Path | None:
    """Of one in PATH, or where pyenv and uv put theirs."""
    homes = ("~/.pyenv/versions", "~/.local/share/uv/python")
    found = [p for home in homes for p in sorted(Path(home).expanduser().glob(f"*{version}.*/bin/python3"))]
    for python in filter(None, (shutil.which(f"python{version}"), *found)):
        try:
            said = run(python, "-c", "import sysconfig; print(sysconfig.get_path('include'))")
        except CannotError:  # pyenv has a python3.12 in PATH that only says which version to choose
            continue
        folder = Path(said.strip())
        if folder.name == f"python{version}" and (folder / "Python.h").is_file():
            return _settled(folder, folder.parent)
    return None


def _settled(folder: Path, root: Path) -> Path:
    """Debian's pyconfig.h looks for another one by the platform: the x86-64 one takes its place."""
    config = folder / "pyconfig.h"
    real = root / "x86_64-linux-gnu" / folder.name / "pyconfig.h"
    if not config.is_file() or "multiarch" not in config.read_text() or not real.is_file():
        return folder
    copy = Path(os.environ["TINYLLM_WHEELS_WORK"]) / "headers" / folder.name
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    shutil.copy(real, copy / "pyconfig.h")
    return copy


def _of_debian(version: str, work: Path) -> Path:
    """Of the first suite that has them; its package lists live in `work`, and nothing is installed."""
    if not shutil.which("apt-get"):
        raise CannotError(
            f"no headers of Python {version}: no python{version} with headers in PATH, and no apt-get"
        )
    for suite in DEBIAN:
        apt = debian(suite, work)
        try:
            run(*apt, "download", f"libpython{version}-dev", cwd=work / "apt" / suite)
        except CannotError:
            continue
        root = work / "apt" / suite / "root"
        for package in (work / "apt" / suite).glob(f"libpython{version}-dev_*.deb"):
            run("dpkg", "-x", package, root)
        return _settled(root / "usr" / "include" / f"python{version}", root / "usr" / "include")
    raise CannotError(
        f"no headers of Python {version}: no python{version} with headers in PATH, and none in Debian's "
        f"{', '.join(DEBIAN)}; give --headers {version}=FOLDER"
    )


def debian(suite: str, work: Path, architecture: str = "amd64") -> tuple[str, ...]:
    """apt-get for one suite of Debian, apart from the machine's own lists and packages."""
    home = work / "apt" / (suite if architecture == "amd64" else f"{suite}-{architecture}")
    options = (
        f"Dir::State={home}/state",
        f"Dir::Cache={home}/cache",
        f"Dir::State::status={home}/state/status",
        f"Dir::Etc::sourcelist={home}/sources.list",
        "Dir::Etc::sourceparts=/dev/null",
        f"APT::Architecture={architecture}",
        f"APT::Architectures={architecture}",
        "APT::Sandbox::User=root",
    )
    apt = ("apt-get", "-qq", *(part for option in options for part in ("-o", option)))
    if not (home / "state").is_dir():
        for folder in ("state/lists/partial", "cache/archives/partial"):
            (home / folder).mkdir(parents=True)
        (home / "state" / "status").touch()
        keys = "/usr/share/keyrings/debian-archive-keyring.gpg"
        source = f"deb [signed-by={keys}] http://deb.debian.org/debian {suite} main"
        (home / "sources.list").write_text(f"{source}\n")
        run(*apt, "update")
    return apt


# ---- the built part


# zig has words of its own for processors, and 512-bit vectors off where they are not named. For macOS it has
# no generic 64-bit ARM (arm_neon.h then asks for the features of an M1), and the M1 is Apple's first.
TRANSLATED = """#!/bin/sh
for option do
    shift
    case $option in
        -march=armv8-a) option=-mcpu={armv8} ;;
        -march=armv8.2-a+dotprod) option=-mcpu={dotprod} ;;
        -mavx512f) set -- "$@" -mevex512 ;;
    esac
    set -- "$@" "$option"
done
"""


def compilers(platform: Platform, work: Path) -> Path:
    """A folder with cc, c++, ar and ranlib for a platform."""
    folder = work / platform.tag / "bin"
    folder.mkdir(parents=True, exist_ok=True)
    is_apple = platform.system == "Darwin"
    translated = TRANSLATED.format(
        armv8="apple_m1" if is_apple else "generic",
        dotprod="apple_m1" if is_apple else "generic+v8_2a+dotprod",
    )
    for name, command in (
        ("cc", f"cc -target {platform.target}"),
        ("c++", f"c++ -target {platform.target}"),
        ("ar", "ar"),
        ("ranlib", "ranlib"),
    ):
        script = folder / name
        script.write_text(f'{translated}exec {sys.executable} -m ziglang {command} "$@"\n')
        script.chmod(0o755)
    return folder


def core(platform: Platform, bin: Path, work: Path) -> Path:
    """The C core for a platform, a static library."""
    build = work / platform.tag / "core"
    tools = {"C_COMPILER": "cc", "CXX_COMPILER": "c++", "AR": "ar", "RANLIB": "ranlib"}
    options = {f"CMAKE_{key}": str(bin / name) for key, name in tools.items()} | {
        "CMAKE_SYSTEM_NAME": platform.system,
        "CMAKE_SYSTEM_PROCESSOR": platform.processor,
        "CMAKE_INSTALL_NAME_TOOL": "true",  # macOS's: CMake wants one, a static library does not
        "CMAKE_OSX_SYSROOT": "",
        "CMAKE_OSX_DEPLOYMENT_TARGET": "",
        "TINYLLM_C_TESTS": "ON",  # the way to the core without the module; no test is built
        "TINYLLM_SANITIZE": "OFF",
        "TINYLLM_CUDA": "OFF",
    }
    run(
        "cmake",
        "-S",
        ROOT,
        "-B",
        build,
        "-G",
        "Ninja",
        *(f"-D{key}={value}" for key, value in options.items()),
    )
    run("cmake", "--build", build, "--target", "tinyllm_core")
    return build / "libtinyllm_core.a"


def module(platform: Platform, version: str, include: Path, bin: Path, library: Path, release: str) -> Path:
    """The built module of a Python."""
    import pybind11

    out = library.parent.parent / f"_core-{version}.so"
    flags = ["-std=c++17", "-O2", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-shared"]
    flags += [f'-DTINYLLM_VERSION="{release}"', '-DTINYLLM_CUDA_BUILD="this wheel is for the CPU"']
    flags += [f"-I{folder}" for folder in (ROOT / "csrc", pybind11.get_include(), include)]
    flags += ["-undefined", "dynamic_lookup"] if platform.system == "Darwin" else ["-Wl,--gc-sections", "-s"]
    run(bin / "c++", *flags, "-o", out, ROOT / "csrc" / "bindings.cpp", library)
    if platform.tag.startswith("musllinux"):  # musl takes any name for itself; auditwheel, only Alpine's
        run("patchelf", "--replace-needed", "libc.so", f"libc.musl-{platform.processor}.so.1", out)
    return out


# ---- checks


def check(wheel: Path, platform: Platform, work: Path) -> str:
    """What the wheel needs of a system; CannotError where that is more than its tag says."""
    if platform.system == "Darwin":
        return _check_macho(wheel, work)
    said = run(sys.executable, "-m", "auditwheel", "show", wheel)
    text = " ".join(said.split())
    found = re.search(
        r'constrains the platform tag to "([^"]+)"|consistent with the following platform tag: "([^"]+)"',
        text,
    )
    tags = [tag for tag in (found.groups() if found else ()) if tag]
    if not any(_covers(tag, platform.tag) for tag in tags):
        raise CannotError(f"auditwheel says: {text}")
    return f"auditwheel: {tags[0]}"


def _covers(found: str, claimed: str) -> bool:
    """Whether a system that has what `claimed` says has what `found` says."""
    pattern = r"(\w+?linux)_(\d+)_(\d+)_(\w+)"
    one, other = re.fullmatch(pattern, found), re.fullmatch(pattern, claimed)
    return bool(
        one
        and other
        and (one[1], one[4]) == (other[1], other[4])
        and (int(one[2]), int(one[3])) <= (int(other[2]), int(other[3]))
    )


def _check_macho(wheel: Path, work: Path) -> str:
    from macholib.MachO import MachO

    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".so"))
        path = Path(archive.extract(name, work / "macho"))
    needed, oldest = set(), "?"
    for header in MachO(str(path)).headers:
        for load, command, data in header.commands:
            if load.get_cmd_name() == "LC_LOAD_DYLIB":
                needed.add(data.rstrip(b"\0").decode())
            if load.get_cmd_name() in ("LC_BUILD_VERSION", "LC_VERSION_MIN_MACOSX"):
                number = getattr(command, "minos", None) or command.version
                oldest = f"{int(number) >> 16}.{int(number) >> 8 & 255}"
    if needed - {"/usr/lib/libSystem.B.dylib"}:
        raise CannotError(f"{wheel.name} needs {', '.join(sorted(needed))}")
    if oldest != "11.0":
        raise CannotError(f"{wheel.name} is for macOS {oldest}, and its tag says 11.0")
    return f"macholib: libSystem alone, macOS {oldest}"


# ---- running


def tokens_of(wheel: Path, python: Sequence[str | Path], folder: Path, **env: str) -> list[int]:
    """What `stories` says, of a wheel installed into `folder` with its needs, in the Python of a command."""
    shutil.rmtree(folder, ignore_errors=True)
    version, tag = re.findall(r"-cp3(\d+)-cp\d+-(\w+)\.whl", wheel.name)[0]
    processor = tag.partition("_2_17_")[2]
    platforms = [f"manylinux{end}_{processor}" for end in ("2014", "_2_17", "_2_27", "_2_28")]
    options = [part for platform in platforms for part in ("--platform", platform)]
    options += ["--only-binary", ":all:", "--implementation", "cp", "--python-version", f"3.{version}"]
    run(sys.executable, "-m", "pip", "install", "--quiet", "--target", folder, *options, wheel)
    command = ("-m", "tinyllm", "run", "stories", "Once upon a time", "-n", "20", "--temp", "0", "--json")
    tokens: list[int] = json.loads(run(*python, *command, PYTHONPATH=str(folder), **env))["tokens"]
    return tokens


def python_aarch64(work: Path) -> tuple[list[str | Path], dict[str, str]]:
    """Debian's Python 3.11 for ARM, unpacked: the command that runs it in qemu-user, and its environment."""
    if not shutil.which("qemu-aarch64"):
        raise CannotError("the ARM wheel is not run: there is no qemu-aarch64 (Debian: qemu-user)")
    apt, home = debian("bookworm", work, "arm64"), work / "apt" / "bookworm-arm64"
    root = home / "root"
    if not root.is_dir():
        run(
            *apt, "install", "--download-only", "--yes", "--no-install-recommends", "python3.11", "libstdc++6"
        )
        for package in (home / "cache" / "archives").glob("*.deb"):
            run("dpkg", "-x", package, root)
    return ["qemu-aarch64", "-L", root, root / "usr" / "bin" / "python3.11"], {
        "PYTHONHOME": str(root / "usr")
    }


def run_both(out: Path, work: Path) -> str:
    """The wheels of glibc for both processors: the same tokens, or CannotError."""
    wheels = [next(out.glob(f"*-cp311-cp311-manylinux_2_17_{p}.whl"), None) for p in ("x86_64", "aarch64")]
    native = shutil.which("python3.11")
    if None in wheels or native is None:
        raise CannotError("no wheel is run: it takes those of 3.11 for x86-64 and aarch64, and a python3.11")
    python, env = python_aarch64(work)
    here = tokens_of(wheels[0], [native], work / "run-x86_64")
    there = tokens_of(wheels[1], python, work / "run-aarch64", **env)
    if here != there or len(here) != 20:
        raise CannotError(f"stories gives {here} on x86-64 and {there} on aarch64")
    return f"stories gives the same {len(here)} tokens on x86-64 and, emulated, on aarch64"


# ---- all of it


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "wheels")
    parser.add_argument("--only", metavar="TAG,...", help="these platforms")
    parser.add_argument("--python", metavar="3.X,...", help="these Pythons")
    parser.add_argument("--headers", metavar="3.X=FOLDER", action="append", default=[])
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args(argv)
    tags = {platform.tag: platform for platform in PLATFORMS}
    only = args.only.split(",") if args.only else list(tags)
    if unknown := [tag for tag in only if tag not in tags]:
        parser.error(f"no such platform: {', '.join(unknown)}; there are {', '.join(tags)}")
    given = {version: Path(folder) for version, _, folder in (text.partition("=") for text in args.headers)}
    work, out = args.work.resolve(), args.out.resolve()
    for folder in (work, out):
        folder.mkdir(parents=True, exist_ok=True)
    os.environ["TINYLLM_WHEELS_WORK"] = str(work)
    os.environ["PATH"] = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"

    failed: list[str] = []
    include: dict[str, Path] = {}
    for version in args.python.split(",") if args.python else PYTHONS:
        try:
            include[version] = headers(version, given, work)
        except CannotError as error:
            failed.append(f"Python {version}: {error}")
    if args.list:
        print("platforms:", ", ".join(only))
        print("Pythons:", ", ".join(f"{version} ({folder})" for version, folder in include.items()))
    else:
        build(out, work, [tags[tag] for tag in only], include, failed)
    if args.run:
        try:
            print(run_both(out, work))
        except CannotError as error:
            failed.append(f"and run: {error}")
    for line in failed:
        print(f"CANNOT BUILD {line}")
    return 1 if failed else 0


def build(
    out: Path, work: Path, platforms: Sequence[Platform], include: dict[str, Path], failed: list[str]
) -> None:
    """Builds and checks, and says of each file its size and checksum."""
    archive = sdist(out, work)
    _say(archive, "the same bytes twice")
    python = python_part(archive, work)
    (info,) = python.glob("*.dist-info")
    release = info.stem.partition("-")[2]
    for platform in platforms:
        try:
            bin = compilers(platform, work)
            library = core(platform, bin, work)
        except CannotError as error:
            failed.append(f"{platform.tag}: {error}")
            continue
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            built = [
                (version, pool.submit(module, platform, version, folder, bin, library, release))
                for version, folder in include.items()
            ]
            for version, one in built:
                try:
                    wheel = assemble(python, one.result(), version, platform, out)
                    _say(wheel, check(wheel, platform, work))
                except CannotError as error:
                    failed.append(f"{platform.tag} for Python {version}: {error}")


def _say(path: Path, what: str) -> None:
    data = path.read_bytes()
    print(
        f"{path.name}  {len(data) / 1e6:.2f} MB  sha256 {hashlib.sha256(data).hexdigest()[:16]}  {what}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
