"""Maps the top-level folders to packages and builds the extension; everything else is in pyproject.toml.

LOGITLESS_EXT says which parts of ``csrc/`` are built: ``auto`` (default) what this machine can, ``none``, or ``cpu``, ``cuda``,
``cpu,cuda``: these, or the installation fails. They are compiled against the torch that is installed, so pip needs
``--no-build-isolation``. LOGITLESS_CUDA_ARCHS: compute capabilities, default "80;90;100".
"""

import ast
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
version = re.search(r'^__version__ = "(.+)"$', (ROOT / "logitless/__init__.py").read_text(), re.M)[1]

#: The top-level package of each top-level folder.
PACKAGES = {"logitless": "logitless", "kernels": "logitless.kernels", "fused": "logitless.fused", "bench": "logitless.bench"}
#: The folder of each package.
FOLDERS = {
    ".".join((PACKAGES[top], *path.parent.relative_to(ROOT / top).parts)): path.parent.relative_to(ROOT).as_posix()
    for top in PACKAGES
    for path in sorted((ROOT / top).rglob("__init__.py"))
}
PARTS = ("cpu", "cuda")
NO_CUDA = "the installed torch is built without CUDA"
MIN_TORCH = (2, 10)  # the first with the stable interface that csrc is written for


def choice() -> str:
    return os.environ.get("LOGITLESS_EXT") or "auto"


def requested() -> list[str]:
    """The parts that must be built; none of them with ``auto`` and ``none``."""
    value = choice()
    parts = [] if value in ("auto", "none") else value.split(",")
    if unknown := [p for p in parts if p not in PARTS]:
        sys.exit(f"LOGITLESS_EXT must be 'auto', 'none' or a list of {', '.join(PARTS)}; got {unknown[0]!r}")
    return parts


def why_not(part: str) -> str | None:
    """The reason why a part cannot be built here."""
    if sys.platform != "linux":
        return f"csrc is written for Linux; this is {sys.platform}"
    try:
        import torch
    except ImportError:
        return (
            "torch cannot be imported. pip builds in an isolated environment unless told otherwise: install torch, "
            "then run pip install --no-build-isolation"
        )
    if tuple(int(x) for x in torch.__version__.split(".")[:2]) < MIN_TORCH:
        return f"it needs torch >= {'.'.join(map(str, MIN_TORCH))}; this is {torch.__version__}"
    compiler = (os.environ.get("CXX") or "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler}; CXX names another)"
    if part == "cuda":
        if torch.version.cuda is None:
            return NO_CUDA
        if nvcc() is None:
            return "there is no nvcc, on PATH or in CUDA_HOME"
        if not (toolkit_folders("I") and toolkit_folders("L")):
            return f"{nvcc()} --dryrun does not say where its headers and libraries are"
    return None


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def name_of(part: str) -> str:
    if part == "cuda":
        return "logitless.kernels._cuda"  # one binary for every torch since MIN_TORCH
    import torch

    major, minor = torch.__version__.split(".")[:2]
    return f"logitless.kernels._cpu_torch{major}_{minor}"


def extension(part: str) -> Extension:
    """A library of torch operators; not a Python module, so it needs no headers of Python."""
    from torch.utils.cpp_extension import include_paths, library_paths

    headers = [flag for path in include_paths() for flag in ("-isystem", path)]
    # -Wno: vectors are passed by value between inlined functions only; GCC's own intrinsics look uninitialised to it
    flags = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-Wno-psabi", "-Wno-maybe-uninitialized", *headers]
    if os.environ.get("LOGITLESS_WERROR"):  # for developers: a compiler unknown to us may warn of more
        flags += ["-Wall", "-Wextra", "-Werror"]
    if part == "cpu":
        flags += ["-fopenmp", "-ffp-contract=off"]  # see fma in csrc/include/logitless/cpu/vec.h
        libraries, link = ["torch_cpu", "c10"], ["-fopenmp"]
    else:
        flags += [flag for path in toolkit_folders("I") for flag in ("-isystem", path)]
        # not in `libraries`, which come before the first of these: it makes the linker keep all the others
        libraries, link = [], ["-Wl,--no-as-needed", "-ltorch_cuda", "-ltorch_cpu", "-lcudart"]
    return Extension(
        name_of(part),
        define_macros=[("LOGITLESS_SCHEMAS", f'"{schemas_digest()}"')],
        sources=sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / part).glob("*.cpp")),
        include_dirs=["csrc/include"],
        library_dirs=[*library_paths(), *(toolkit_folders("L") if part == "cuda" else [])],
        libraries=libraries,
        extra_compile_args=flags,
        extra_link_args=link,
        language="c++",
        depends=["kernels/operators/schemas.py", *(str(p) for p in (ROOT / "csrc").rglob("*") if p.is_file())],
    )


def toolkit_folders(flag: str) -> list[str]:
    """Where nvcc looks for headers (``I``) and libraries (``L``). It knows: what is on PATH may be a wrapper."""
    command = [nvcc(), "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    report = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    names = {"I": ("INCLUDES", "SYSTEM_INCLUDES"), "L": ("LIBRARIES",)}[flag]
    lines = re.findall(rf"^#\$ (?:{'|'.join(names)})=(.*)$", report, re.M)
    words = [word for line in lines for word in shlex.split(line)]
    return [os.path.realpath(word.removeprefix(f"-{flag}")) for word in words if word != "-isystem"]


def schemas_digest() -> str:
    """Of the operators' schemas: a library built for others must not be loaded."""
    tree = ast.parse((ROOT / "kernels/operators/schemas.py").read_text())
    (value,) = (n.value for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "SCHEMAS")
    return hashlib.sha256(repr(ast.literal_eval(value)).encode()).hexdigest()[:16]


def cuda_architectures() -> list[str]:
    """nvcc's flags: code for each architecture, and PTX of the newest for those to come."""
    archs = os.environ.get("LOGITLESS_CUDA_ARCHS", "80;90;100").split(";")
    newest = max(archs, key=int)
    return [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs] + [f"-gencode=arch=compute_{newest},code=compute_{newest}"]


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Prints what takes a while, and how long it took."""
    start = time.monotonic()
    print(f"{what} ...", flush=True)
    yield
    print(f"{what}: done after {time.monotonic() - start:.0f} s", flush=True)


class Build(build_ext):
    """Compiles CUDA sources with nvcc; what nobody asked for may fail, with the reason."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # the same for every Python

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return ext.export_symbols

    def build_extension(self, ext: Extension) -> None:
        part = "cuda" if ext.name.endswith("_cuda") else "cpu"
        try:
            if part == "cuda":
                with stage("building the CUDA kernels"):
                    ext.extra_objects = self._cuda_objects(ext)
            with self._parallel_compiler():
                super().build_extension(ext)
        except Exception as error:
            reason = f"the compiler failed ({error})"
            if part in requested():
                refuse(part, reason)
            tell([part], reason)
            ext.optional = True  # the build goes on without its library, and without one of an earlier build
            for path in (Path(self.get_ext_fullpath(ext.name)), ROOT / "kernels" / (ext.name.rpartition(".")[2] + ".so")):
                path.unlink(missing_ok=True)

    @contextmanager
    def _parallel_compiler(self) -> Iterator[None]:
        """One source file on each core."""
        one_by_one = self.compiler.compile

        def compile_all(sources: list[str], **options: Any) -> list[str]:
            with stage("building the C++ kernels"), ThreadPoolExecutor(os.cpu_count()) as pool:
                return list(chain.from_iterable(pool.map(lambda source: one_by_one([source], **options), sources)))

        self.compiler.compile = compile_all
        try:
            yield
        finally:
            self.compiler.compile = one_by_one

    def _cuda_objects(self, ext: Extension) -> list[str]:
        from torch.utils.cpp_extension import include_paths

        folder = Path(self.build_temp) / "csrc/cuda"
        folder.mkdir(parents=True, exist_ok=True)
        objects = []
        for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
            out = folder / (source.stem + ".cu.o")
            headers = [flag for path in include_paths() for flag in ("-isystem", path)]
            flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Icsrc/include", *headers]
            subprocess.run([nvcc(), "-c", str(source), "-o", str(out), *flags, *cuda_architectures()], check=True, cwd=ROOT)
            objects.append(str(out))
        return objects


def refuse(part: str, reason: str) -> NoReturn:
    sys.exit(textwrap.fill(f"logitless: LOGITLESS_EXT asks for the {part} kernels, which cannot be built: {reason}.", 100))


def tell(parts: list[str], reason: str) -> None:
    text = (
        f"logitless: the {' and '.join(parts)} kernels of csrc are not built: {reason}. The library works without them, on "
        f"torch's own operators, more slowly. LOGITLESS_EXT={','.join(parts)} makes this an error, LOGITLESS_EXT=none silences "
        "it; `logitless env` shows what runs."
    )
    print(textwrap.fill(text, 100), file=sys.stderr)


def extensions() -> list[Extension]:
    needed = requested()
    if choice() == "none":
        return []
    found: list[Extension] = []
    missing: dict[str, list[str]] = {}  # the parts, by the reason
    for part in needed or PARTS:
        reason = why_not(part)
        if reason is None:
            found.append(extension(part))
        elif needed:
            refuse(part, reason)
        else:
            missing.setdefault(reason, []).append(part)
    missing.pop(NO_CUDA, None)  # nobody misses them
    for reason, parts in missing.items():
        tell(parts, reason)
    return found


#: Other commands (metadata, sdist) need not ask what can be built.
BUILDS = {"build", "build_ext", "bdist_wheel", "editable_wheel", "install", "develop"}

setup(
    version=version,
    packages=list(FOLDERS),
    package_dir=FOLDERS,
    package_data={
        "logitless": ["py.typed"],
        "logitless.kernels.cost_model": ["gpu_constants.json"],
        "logitless.kernels.backends.triton.tuning": ["configs.json"],
    },
    ext_modules=extensions() if BUILDS & set(sys.argv) else [],
    cmdclass={"build_ext": Build},
)
