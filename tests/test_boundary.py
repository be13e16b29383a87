"""What holds the parts apart: the core's size, who includes and imports whom, and that what is written twice
(the stub of the built module, the table of formats, a few constants) says the same both times."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType, WrapperDescriptorType
from typing import Any

import count_lines
import pytest
from helpers_models import golden_model, golden_spec

import tinyllm
from tinyllm import _core, backends, loading
from tinyllm.backends import cuda
from tinyllm.config import config_from_json
from tinyllm.config.model import BOUNDS
from tinyllm.engine import kvcache
from tinyllm.engine.sampling import SamplingOptions, SamplingParams
from tinyllm.files import FORMATS

ROOT = Path(__file__).resolve().parents[1]
CSRC, CUDA, PACKAGE = ROOT / "csrc", ROOT / "cuda", ROOT / "src" / "tinyllm"

# ---- sizes


def test_the_core_fits_its_budget() -> None:
    lines = count_lines.core_lines()
    assert sum(lines.values()) <= count_lines.CORE_LIMIT, lines


def test_lines_are_counted_without_blanks_and_comments() -> None:
    source = r"""
// one
int a; // two
/* three

four */ int b; /* five */
char *c = "// no comment", d = '"'; /*
*/
char *e = "/*"; // "
#define F /* six */ \
    7 // eight \
    still a comment

    /* nine */
"""
    assert count_lines.count(source) == 6  # a, b, c and d, e, the two lines of F
    assert count_lines.count("") == 0
    assert count_lines.count("}\n{\n") == 2


def test_every_source_file_is_counted_once() -> None:
    found = {
        str(p.relative_to(ROOT))
        for folder in (CSRC, CUDA)
        for p in folder.rglob("*")
        if p.suffix in count_lines.SUFFIXES
    }
    core, other = count_lines.core_lines(), count_lines.other_lines()
    assert not set(core) & set(other)
    assert set(core) | set(other) == found
    assert all(count_lines.table().count(f"| {name} | {n} |") == 1 for name, n in {**core, **other}.items())


# ---- C: who includes whom


def sources(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix in count_lines.SUFFIXES)


def includes(path: Path) -> tuple[set[str], set[str]]:
    """What a file includes: the project's headers ("..."), the system's (<...>)."""
    found = re.findall(
        r'^\s*#\s*include\s*(?:"([^"]+)"|<([^>]+)>)', path.read_text(encoding="utf-8"), re.MULTILINE
    )
    return {own for own, _ in found if own}, {system for _, system in found if system}


# csrc/'s folders from the ground up ("." is its root), each with what the floors above may include of it.
# Beside these a file includes headers of its own folder, and TARGETS every fragment (.inc) below them.
FLOORS: dict[str, set[str]] = {
    ".": {"tinyllm.h", "numeric.h"},
    "formats": {"formats/formats.h"},
    "kernels": set(),
    "isa": {"isa/isa.h"},
    "cpu": set(),
}
TARGETS = {"isa/target.inc", "isa/tiles.inc"}
FRAGMENTS = {str(p.relative_to(CSRC)) for p in CSRC.rglob("*.inc")} - TARGETS


def may_include(name: str) -> set[str]:
    """What a file of csrc/ may include, all names with their folders from csrc/ on."""
    folder = Path(name).parent.as_posix()
    assert folder in FLOORS, f"csrc/{folder} is new: FLOORS says on what it stands"
    floors = list(FLOORS)
    below = floors[: floors.index(folder)]
    own = {str(p.relative_to(CSRC)) for p in (CSRC / folder).iterdir() if p.suffix in (".h", ".inc")}
    fragments = {f for f in FRAGMENTS if Path(f).parent.as_posix() in below}
    allowed = (own - FRAGMENTS).union(*(FLOORS[floor] for floor in below))
    return allowed | fragments if name in TARGETS else allowed


@pytest.mark.parametrize("path", sources(CSRC), ids=lambda p: str(p.relative_to(CSRC)))
def test_include_directions(path: Path) -> None:
    name = str(path.relative_to(CSRC))
    own, _ = includes(path)
    assert own <= may_include(name)
    assert not own or name not in FRAGMENTS, "targets include fragments; they include nothing"


def test_every_floor_is_there() -> None:
    assert {p.parent.relative_to(CSRC).as_posix() for p in sources(CSRC)} == set(FLOORS)


@pytest.mark.parametrize(
    ("name", "included"),
    [
        ("weights.c", "formats/formats.h"),
        ("formats/pack.c", "isa/isa.h"),
        ("isa/select.c", "cpu/cpu.h"),
        ("isa/avx2.c", "kernels/matmul.inc"),
        ("cpu/rows.c", "kernels/rows.inc"),
        ("cpu/rows.c", "isa/avx2.h"),
        ("cpu/rows.c", "cpu/run.c"),
        ("cpu/rows.c", "cpu.h"),
        ("cpu/rows.c", "../tinyllm.h"),
    ],
)
def test_floors_forbid(name: str, included: str) -> None:
    """The rule above is worth nothing if it allows everything."""
    assert included not in may_include(name)


def test_the_path_that_is_counted_is_whole() -> None:
    """A new file of the CPU's is on a token's path (count_lines.BESIDE), or it is named here."""
    path = {name.removeprefix("csrc/") for name in count_lines.path_lines()}
    rounding = {f"formats/quantize{part}.inc" for part in ("", "_k", "_small", "_codebook")}
    there = {str(p.relative_to(CSRC)) for f in ("cpu", "formats", "kernels") for p in sources(CSRC / f)}
    numbers = {"formats/codebooks.h"}
    apart = {"cpu/adapters.c", "cpu/bandwidth.c", "cpu/quantize.c", "kernels/read.inc", "kernels/tiles.inc"}
    apart |= rounding | numbers
    assert there - path == apart
    included = set().union(*(includes(CSRC / name)[0] for name in path))
    assert included - path == {"kernels/read.inc"} | rounding | numbers


def test_a_new_folder_is_on_no_floor() -> None:
    with pytest.raises(AssertionError, match="csrc/metal is new"):
        may_include("metal/backend.c")


@pytest.mark.parametrize(
    "name",
    [
        *("model.c", "cache.c", "threads.c", "check.c", "memory.c", "source.c", "repetition.h"),
        "bindings.cpp",
    ],
)
def test_knows_the_interface_only(name: str) -> None:
    own, _ = includes(CSRC / name)
    assert own == {"tinyllm.h"}


def test_sampling_is_two_files() -> None:
    for name in ("sample.c", "repetition.c"):
        assert includes(CSRC / name)[0] == {"repetition.h"}


def test_the_forward_pass_includes_nothing_else_at_all() -> None:
    assert includes(CSRC / "model.c") == ({"tinyllm.h"}, set())


def test_the_interface_stands_alone() -> None:
    own, system = includes(CSRC / "tinyllm.h")
    assert own == set()
    assert system <= {"stddef.h", "stdint.h"}


def test_intrinsics_are_in_isa_only() -> None:
    intrinsic = re.compile(r"\w*intrin\.h|arm_\w+\.h")
    used = {path.parent for path in sources(CSRC) if any(intrinsic.fullmatch(s) for s in includes(path)[1])}
    assert used == {CSRC / "isa"}
    call = re.compile(r"\b_mm\d*_\w+|\b__builtin_(?:ia32|aarch64|neon)_\w+|\bv\w+q_[fsu]\d+\b")
    for path in sources(CSRC):
        if path.parent != CSRC / "isa":
            assert not call.search(path.read_text(encoding="utf-8")), path


def test_cuda_knows_the_interface_only() -> None:
    for path in sources(CUDA):
        for name in includes(path)[0]:
            at_home = (path.parent / name).resolve().is_relative_to(CUDA) and (path.parent / name).exists()
            assert name.rsplit("/", 1)[-1] == "tinyllm.h" or at_home or (CUDA / name).exists(), (path, name)
    for path in sources(CSRC):
        assert not any("cuda" in name for name in set().union(*includes(path))), path


# ---- Python: who imports whom

# From the ground up: a room (a folder or a file of the package) imports what stands below it, nothing on its
# own floor or above. "tinyllm" is the package itself (its __init__.py).
ROOMS: list[set[str]] = [
    {"errors"},
    {"config"},
    {"files"},
    {"adapters"},
    {"backends", "chat", "hub", "tokenizer"},
    {"constraints", "engine"},
    {"modelfiles", "results", "sampling"},
    {"habits"},
    {"llm"},
    {"quantization"},
    {"loading"},
    {"tinyllm"},
    {"llama_cpp", "measure", "pipeline", "server"},
    {"batch"},
    {"ray"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: number for number, floor in enumerate(ROOMS) for room in floor}


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules of this package that a file imports, wherever in the file it does."""
    package = ["tinyllm", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "tinyllm")


def test_imports_are_found() -> None:
    """The rules below are worth nothing if this finds nothing."""
    backends_import = set(imports(PACKAGE / "backends" / "__init__.py"))
    assert backends_import >= {"tinyllm._core", "tinyllm.config.ModelConfig", "tinyllm.backends.cuda"}
    assert "tinyllm.files.FORMATS" in set(imports(PACKAGE / "files" / "names.py"))
    assert "tinyllm.errors.Error" in set(imports(PACKAGE / "cli" / "common.py"))


def part_of(name: str) -> str:
    """The part of the package that an imported name belongs to."""
    parts = name.split(".")
    there = len(parts) > 1 and (
        (PACKAGE / parts[1]).is_dir()
        or (PACKAGE / f"{parts[1]}.py").exists()
        or (PACKAGE / f"{parts[1]}.pyi").exists()
    )
    return parts[1] if there else "tinyllm"


def test_one_module_opens_libraries() -> None:
    openers = re.compile(r"\b(import|from) (cffi|ctypes)\b")
    found = {p.name for p in PACKAGE.rglob("*.py") if openers.search(p.read_text(encoding="utf-8"))}
    assert found == {"cuda.py"}


MODULES = pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return "tinyllm" if first == "__init__.py" else first.removesuffix(".py")


@MODULES
def test_import_directions(path: Path) -> None:
    room = room_of(path)
    assert room in FLOOR, f"{room} is new: ROOMS says where it stands"
    imported = {part_of(name) for name in imports(path)} - {room}
    if room == "backends" or path in (PACKAGE / "files" / "gguf.py", PACKAGE / "tokenizer" / "spm.py"):
        imported.discard("_core")
    above = {name for name in imported if name not in FLOOR or FLOOR[name] >= FLOOR[room]}
    assert not above


@MODULES
def test_private_names_stay_in_their_room(path: Path) -> None:
    for name in imports(path):
        *_, last = name.split(".")
        private = last.startswith("_") and not last.startswith("__")
        assert not private or name == "tinyllm._core" or part_of(name) == room_of(path), name


def test_every_floor_is_built() -> None:
    assert set(FLOOR) == {room_of(path) for path in PACKAGE.rglob("*.py")}


def test_the_picture_shows_every_floor() -> None:
    """CONTRIBUTING draws the rooms from the top down: in the order of ROOMS, none forgotten."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    picture = text.split("```")[3]
    drawn = re.findall(r"^([a-z_]+)(?:/|\.py)  ", picture, re.MULTILINE)
    assert [FLOOR[room] for room in drawn] == sorted((FLOOR[room] for room in drawn), reverse=True)
    assert set(drawn) == set(FLOOR) - {"tinyllm", "sampling", "__main__"}  # what has no code of its own


def test_the_table_of_additions_names_files_that_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text[text.index("## To add a") : text.index("## Rules of the house")]
    named = {
        name.replace("\\", "")
        for name in re.findall(r"[\w\\/]+(?:\.fr)?\.(?:py|c|h|inc|cpp|cuh|cu|pyi|toml|md|sh|json)\b", table)
    }
    there = [
        str(path)
        for home in ("benchmarks", "csrc", "cuda", "docs", "examples", "src", "tests")
        for path in (ROOT / home).rglob("*")
    ]
    there += [str(path) for path in ROOT.iterdir()]
    assert len(named) > 30
    assert not [
        n
        for n in named
        if "NAME" not in n and n != "llama.cpp" and not any(path.endswith("/" + n) for path in there)
    ]


# ---- what is written twice


def stub_members(body: list[ast.stmt]) -> dict[str, list[str] | None]:
    """Public names in a stub: a function's parameters, None for what is no function."""
    found: dict[str, list[str] | None] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef):
            is_property = any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list)
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            found[node.name] = None if is_property else [a.arg for a in given]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = None
        elif isinstance(node, ast.ClassDef):
            found[node.name] = None
    return found


def built_members(owner: ModuleType | type) -> dict[str, list[str] | None]:
    """The same of the built module, from the signatures that pybind11 writes into docstrings."""
    found: dict[str, list[str] | None] = {}
    for name, value in vars(owner).items():
        inherited = isinstance(value, WrapperDescriptorType)  # an __init__ that only says no
        if name.startswith("_") and (name != "__init__" or inherited):
            continue
        if isinstance(value, (type, property)) or not callable(value):
            found[name] = None
            continue
        match = re.match(rf"{name}\((.*)\)(?: -> .*)?$", (value.__doc__ or "").splitlines()[0])
        assert match, f"{name} has no signature: {value.__doc__!r}"
        found[name] = re.findall(r"(?:^|, )(\w+)(?=: )", without_brackets(match[1]))
    return found


def without_brackets(signature: str) -> str:
    """A signature with what stands in brackets left out, so that commas separate parameters only."""
    while (shorter := re.sub(r"\[[^\[\]]*\]|\([^()]*\)", "", signature)) != signature:
        signature = shorter
    return signature


STUB = ast.parse((PACKAGE / "_core.pyi").read_text(encoding="utf-8")).body


def test_stub_names_what_the_module_has() -> None:
    assert stub_members(STUB) == built_members(_core)


@pytest.mark.parametrize("name", [node.name for node in STUB if isinstance(node, ast.ClassDef)])
def test_stub_names_what_the_classes_have(name: str) -> None:
    (declared,) = (node for node in STUB if isinstance(node, ast.ClassDef) and node.name == name)
    assert stub_members(declared.body) == built_members(getattr(_core, name))


def test_format_tables_agree() -> None:
    core = {id: (name.upper(), block, n_bytes) for id, name, block, n_bytes, *_ in _core.formats()}
    assert core == {id: (f.name, f.block, f.block_bytes) for id, f in FORMATS.items()}


def test_constants_agree() -> None:
    header = (CSRC / "tinyllm.h").read_text(encoding="utf-8")

    def defined(name: str) -> int:
        (value,) = re.findall(rf"^#define {name}\s+(\d+)\b", header, re.MULTILINE)
        return int(value)

    assert defined("TL_PAGE") == kvcache.PAGE
    assert defined("TL_MAX_THREADS") == backends.MAX_THREADS
    for name, id in backends.CACHE_TYPES.items():
        assert FORMATS[id].name.lower() == name
    assert BOUNDS["context"][1] == loading.MAX_CONTEXT
    (most,) = re.findall(
        r"max_pages < 1 \|\| max_pages > 1 << (\d+)", (CSRC / "cache.c").read_text(encoding="utf-8")
    )
    assert 1 << int(most) == loading.MAX_PAGES


def test_cffi_is_told_what_the_headers_say() -> None:
    def code(text: str) -> str:
        return " ".join(re.sub(r"//[^\n]*|#[^\n]*", "", text).split())

    headers = code((CSRC / "tinyllm.h").read_text() + (CUDA / "tinyllm_cuda.h").read_text())
    declarations = re.findall(r"[^{};]+(?:\{[^}]*\}[^;]*)?;", code(cuda.CORE + cuda.INTERFACE))
    assert len(declarations) == 9
    missing = [d for d in declarations if d.strip() not in headers]
    assert missing == ["typedef int tl_status;"]
    (enum,) = re.findall(r"typedef enum tl_status \{(.*?)\}", (CSRC / "tinyllm.h").read_text(), re.DOTALL)
    names = re.findall(r"\bTL_[A-Z]+\b", enum)
    assert {names[status]: error for status, error in cuda.ERRORS.items()} == {
        "TL_ARGUMENT": tinyllm.ArgumentError,
        "TL_MEMORY": tinyllm.MemoryLimitError,
    }


def test_options_of_a_call_are_the_fields_of_its_parameters() -> None:
    declared = {f.name: f.type for f in fields(SamplingParams)}
    assert SamplingOptions.__annotations__.keys() == declared.keys()
    for name, hint in SamplingOptions.__annotations__.items():
        assert hint.__forward_arg__ == declared[name]


@pytest.mark.parametrize(
    "function",
    [tinyllm.LLM.__call__, tinyllm.LLM.stream, tinyllm.LLM.chat, tinyllm.Session.sample],
    ids=lambda function: function.__qualname__,
)
def test_signatures_name_every_option(function: Callable[..., Any]) -> None:
    parameters = inspect.signature(function).parameters
    assert {f.name for f in fields(SamplingParams)} <= set(parameters)
    assert not [p for p in parameters.values() if p.kind is p.VAR_KEYWORD]


PAGE_SIZES = [
    (type, d) for type in backends.CACHE_TYPES for d in (20, 64, 96) if type != "q8_0" or d % 32 == 0
]


@pytest.mark.parametrize(("cache_type", "head_dim"), PAGE_SIZES)
def test_sizes_of_pages_agree(cache_type: backends.CacheType, head_dim: int) -> None:
    """What loading calculates with is what the core takes."""
    config = config_from_json({**golden_spec("llama3").config, "head_dim": head_dim})
    model = backends.Model(config, threads=1)
    assert model.cache(cache_type, 1).page_bytes == backends.page_bytes(config, cache_type)
    model.close()


def test_pages_of_q8_0_need_whole_groups(tmp_path: Path) -> None:
    spec = golden_spec("llama3")
    small = spec._replace(config={**spec.config, "head_dim": 20})
    with pytest.raises(tinyllm.ArgumentError, match="heads of a multiple of 32 dimensions, not 20"):
        tinyllm.load(golden_model(small, tmp_path), cache_type="q8_0")


def test_errors_of_the_core_exist() -> None:
    """The binding raises these by name."""
    names = set(re.findall(r'"(\w+Error)"', (CSRC / "bindings.cpp").read_text(encoding="utf-8")))
    assert len(names) >= 5
    for name in names:
        assert issubclass(getattr(tinyllm.errors, name), tinyllm.Error)
