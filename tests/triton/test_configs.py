"""Configurations of the Triton kernels: the table, the choice from it, and their measurement, cache and export."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import logitless as ll
from logitless import env
from logitless.cli import main

from .conftest import DEVICE, replace_in_backend

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources

from logitless.kernels.backends.triton.gemm.config import GemmConfig
from logitless.kernels.backends.triton.tuning import configs, export, lookup, search, workload
from logitless.kernels.backends.triton.tuning.cache import read
from logitless.kernels.backends.triton.tuning.configs import parse, pick
from logitless.kernels.backends.triton.tuning.lookup import gemm_config
from logitless.kernels.backends.triton.tuning.problem import Problem, Timing, device_name
from logitless.kernels.backends.triton.tuning.workload import MOST_BLOCK_N, Workload

#: NumPy's, in the interpreter.
pytestmark = [
    pytest.mark.blas,
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]
N, H, V = 6, 16, 40
ROW = {
    "max_tokens": None, "BLOCK_N": 64, "BLOCK_V": 128, "BLOCK_H": 32, "GROUP": 8, "PART": 32, "SOFTCAP_PART": 16,
    "num_warps": 8, "num_stages": 2, "tma": False, "flatten": False, "programs_per_sm": 2,
}  # fmt: skip


def a_table(*rows: dict) -> dict:
    return {"sm_90": {"source": "a test", "16": list(rows), "32": [ROW]}}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{**ROW, "BLOCK": 1}], r"sm_90\.16: .* must have the fields"),
        ([{k: v for k, v in ROW.items() if k != "tma"}], r"sm_90\.16: .* must have the fields"),
        ([{**ROW, "BLOCK_N": 96}], r"sm_90\.16: BLOCK_N must be a power of 2, got 96"),
        ([{**ROW, "PART": "32"}], r"sm_90\.16: "),
        ([{**ROW, "BLOCK_H": 8}], r"sm_90\.16: BLOCK_H must be at least 16, got 8"),
        ([{**ROW, "num_stages": 0}], r"sm_90\.16: num_stages must be at least 1, got 0"),
        ([{**ROW, "max_tokens": 64}], r"sm_90\.16 must end with .* \(max_tokens null\)"),
        ([], r"sm_90\.16 has no configuration"),
    ],
)
def test_a_wrong_table_is_an_error_that_names_the_entry(rows, message):
    with pytest.raises(ValueError, match=message):
        parse(a_table(*rows))
    with pytest.raises(ValueError, match=r"sm_90\.32 has no configuration"):
        parse({"sm_90": {"16": [ROW]}})


def test_the_first_row_for_so_many_tokens_is_chosen():
    rows = parse(a_table({**ROW, "max_tokens": 64, "GROUP": 1}, {**ROW, "max_tokens": 512, "GROUP": 2}, ROW))["sm_90"]["16"]
    assert [pick(rows, n).GROUP for n in (0, 1, 64, 65, 512, 513, 10**9)] == [1, 1, 1, 2, 2, 8, 8]


def test_unaligned_operands_change_nothing_that_a_log_probability_or_the_memory_depends_on():
    for sizes in configs.table().values():
        for row in (row for rows in sizes.values() for row in rows):
            assert asdict(row.for_unaligned()) == {**asdict(row), "BLOCK_H": 16, "tma": False}


def test_the_table_that_is_shipped_survives_being_written():
    entries = json.loads(configs.TABLE.read_text())
    assert json.loads(configs.dumps(entries)) == entries
    assert {"sm_80", "sm_90", "sm_100", "default", "interpreter"} <= set(configs.table())


@pytest.mark.parametrize(
    ("capability", "name"),
    [((7, 5), "default"), ((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90"), ((10, 0), "sm_100"), ((10, 3), "sm_100"),
     ((11, 0), "sm_100"), ((12, 0), "sm_80")],
)  # fmt: skip
def test_each_architecture_has_its_rows(monkeypatch, capability, name):
    monkeypatch.setattr(configs, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert configs.architecture_of.__wrapped__(torch.device("cuda", 0)) == name
    assert configs.architecture_of.__wrapped__(torch.device("xpu", 0)) == "default"


def test_candidates_change_nothing_that_sums_or_memory_depend_on():
    for sizes in configs.table().values():
        for row in (row for rows in sizes.values() for row in rows):
            found = list(search.candidates(row, tma=True))
            assert len(set(found) - {row}) >= 5
            for name in ("BLOCK_V", "BLOCK_H", "PART", "SOFTCAP_PART"):
                assert {getattr(c, name) for c in found} == {getattr(row, name)}
            assert max(c.BLOCK_N for c in found) <= MOST_BLOCK_N
            without = set(search.candidates(replace(row, tma=False), tma=False))
            assert not any(c.tma for c in without)


class Measured(list):
    """Configurations that were measured."""


@pytest.fixture
def measured(monkeypatch, tmp_path) -> Measured:
    """Autotuning with few candidates, a cache of its own, and nothing known to this process."""
    found = Measured()
    measure = Workload.measure

    def record(self, config):
        found.append(config)
        return measure(self, config)

    monkeypatch.setattr(Workload, "measure", record)
    monkeypatch.setattr(search, "LIMIT", 2)
    monkeypatch.setattr(lookup, "_known", {})
    monkeypatch.setenv("LOGITLESS_AUTOTUNE", "1")
    monkeypatch.setenv("LOGITLESS_CACHE_DIR", str(tmp_path / "cache"))
    return found


def a_problem(**changes) -> Problem:
    problem = Problem(torch.empty(0, device=DEVICE).device, torch.float32, 16, H, V, False)
    return replace(problem, **changes)


def chosen(problem: Problem) -> GemmConfig:
    p = problem
    return gemm_config(p.device, p.dtype, p.num_tokens, p.hidden_size, p.vocab_size, p.softcap)


def files() -> list[Path]:
    return [p for p in configs.cache_folder().rglob("*") if p.is_file()]


def in_processes(code: str, *arguments: list[str]) -> list[str]:
    """What Python prints, in processes that run at the same time."""
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "TRITON_INTERPRET": "0" if DEVICE.type == "cuda" else "1"}
    running = [
        subprocess.Popen([*command, *a], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for a in arguments
    ]
    printed = []
    for process in running:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err[-2000:]
        printed.append(out.strip())
    return printed


def test_without_autotuning_nothing_is_timed_or_written(measured, monkeypatch):
    for value in ("0", ""):
        monkeypatch.setenv("LOGITLESS_AUTOTUNE", value)
        row = pick(configs.table()[a_problem().architecture]["32"], 16)
        assert chosen(a_problem()) == row
    assert not measured
    assert not configs.cache_folder().exists()
    monkeypatch.setenv("LOGITLESS_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="LOGITLESS_AUTOTUNE must be 0 or 1, got 'yes'"):
        chosen(a_problem())


READ = """
import sys, torch
from logitless.kernels.backends.triton.tuning import lookup
lookup.Workload = None
device = torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu").device
print(lookup.gemm_config(device, torch.float32, *map(int, sys.argv[1:]), False))
"""


def test_a_shape_is_measured_once_and_then_read_here_and_by_other_processes(measured, monkeypatch):
    first = chosen(a_problem(num_tokens=9))
    assert len(measured) == search.LIMIT
    assert measured[0] == a_problem().starts()[0]
    assert chosen(a_problem(num_tokens=16)) == first  # the same power of 2
    monkeypatch.setattr(lookup, "_known", {})
    assert chosen(a_problem()) == first
    assert len(measured) == search.LIMIT
    assert len(files()) == 1
    # had it been measured, another one would be as likely
    (path,) = files()
    entry = json.loads(path.read_text())
    other = replace(first, GROUP=32)
    path.write_text(json.dumps({**entry, "config": asdict(other)}))
    assert in_processes(READ, ["13", str(H), str(V)]) == [repr(other)]


def test_a_policy_and_its_reference_get_one_configuration(measured, monkeypatch):
    asked: list[GemmConfig] = []

    def record(*arguments):
        asked.append(gemm_config(*arguments))
        return asked[-1]

    replace_in_backend(monkeypatch, "gemm_config", record)
    hidden, weight = torch.randn(N, H, device=DEVICE), torch.randn(V, H, device=DEVICE)
    labels = torch.randint(V, (N,), device=DEVICE)
    with ll.settings(backend="triton"):
        with torch.no_grad():
            reference = ll.linear_logps(hidden, weight, labels).logps
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        policy = ll.linear_logps(x, w, labels, outputs=("logps", "entropy")).logps
        policy.sum().backward()
        frozen = ll.linear_logps(x, weight, labels).logps
    assert len(asked) >= 4
    assert len(set(asked)) == len(files()) == 1
    assert torch.equal(policy, reference)
    assert torch.equal(frozen, reference)


def test_other_sizes_softcap_and_triton_are_other_files(monkeypatch, tmp_path):
    monkeypatch.setenv("LOGITLESS_CACHE_DIR", str(tmp_path))
    changes: list[dict] = [{}, {"num_tokens": 32}, {"hidden_size": 32}, {"vocab_size": 41}, {"softcap": True}]
    changes.append({"dtype": torch.float16})
    paths = [a_problem(**c).path() for c in changes]
    monkeypatch.setattr(workload.triton, "__version__", "3.99")
    assert len({*paths, a_problem().path()}) == len(changes) + 1


@pytest.mark.parametrize("how", ["no JSON", "no UTF-8", "cut off", "of another device", "a wrong configuration", "a list"])
def test_a_file_that_is_not_the_caches_is_an_error_that_names_it(measured, how):
    problem = a_problem()
    good = {"key": problem.key(), "config": ROW}
    contents = {
        "no JSON": b"BLOCK_N = 64",
        "no UTF-8": b"\xff\xfe",
        "cut off": json.dumps(good).encode()[:-7],
        "of another device": json.dumps({**good, "key": {**problem.key(), "device": "another"}}).encode(),
        "a wrong configuration": json.dumps({**good, "config": {**ROW, "BLOCK_N": 3}}).encode(),
        "a list": b"[]",
    }
    problem.path().parent.mkdir(parents=True)
    problem.path().write_bytes(contents[how])
    with pytest.raises(ValueError, match=r"interpreter|triton-.* is not a configuration") as caught:
        chosen(problem)
    assert str(problem.path()) in str(caught.value)
    assert problem.path().read_bytes() == contents[how]
    assert not measured


WRITE = """
import sys, torch
from dataclasses import replace
from logitless.kernels.backends.triton.tuning.cache import store
from logitless.kernels.backends.triton.tuning.problem import Problem, Timing
device = torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu").device
for i in range(60):
    problem = Problem(device, torch.float32, 16, 16, 100 + i, False)
    mine = replace(problem.starts()[0], GROUP=int(sys.argv[1]))
    print(store(problem.path(), problem, Timing(mine, 1.0, 2.0)).GROUP)
"""


def test_of_processes_that_write_at_one_time_the_first_decides_for_all(monkeypatch, tmp_path):
    monkeypatch.setenv("LOGITLESS_CACHE_DIR", str(tmp_path))
    one, other = in_processes(WRITE, ["4"], ["64"])
    assert one == other
    problems = [a_problem(vocab_size=100 + i) for i in range(60)]
    assert [str(found.GROUP) for p in problems if (found := read(p.path(), p))] == one.split()
    assert sorted(files()) == sorted(p.path() for p in problems)  # and no drafts


def spoilt(monkeypatch, which: Callable[[GemmConfig], bool], spoil: Callable[..., None]) -> None:
    """Lets the kernel go wrong for some configurations; ``spoil`` gets the statistics."""
    score_block = workload.score_block

    def run(*arguments, **named):
        result = score_block(*arguments, **named)
        if which(arguments[11]):
            spoil(arguments[7])
        return result

    monkeypatch.setattr(workload, "score_block", run)


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_a_candidate_with_wrong_results_is_an_error_that_names_it(measured, monkeypatch, wrong):
    table = a_problem().starts()[0]
    spoilt(monkeypatch, lambda config: config != table, lambda stats: stats.add_(wrong))
    with pytest.raises(RuntimeError, match=r"GemmConfig\(.*\) is miscompiled: .* differ from the table's by"):
        chosen(a_problem())
    assert not files()


def test_a_candidate_that_does_not_fit_is_skipped_with_a_line_that_names_it(measured, monkeypatch, caplog):
    table = a_problem().starts()[0]

    def overflow(stats):
        raise OutOfResources(300_000, 232_448, "shared memory")

    spoilt(monkeypatch, lambda config: config != table, overflow)
    with caplog.at_level(logging.DEBUG, logger="logitless"):
        assert chosen(a_problem()) == table
    assert f"{measured[1]} is skipped: OutOfResources" in caplog.text

    spoilt(monkeypatch, lambda config: True, overflow)
    with pytest.raises(RuntimeError, match="none of 2 configurations runs for Problem"):
        chosen(a_problem(vocab_size=41))


def test_an_error_that_is_not_triton_s_is_raised(measured, monkeypatch):
    def fail(stats):
        raise RuntimeError("an illegal memory access was encountered")

    spoilt(monkeypatch, lambda config: True, fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        chosen(a_problem())


def test_what_is_fastest_but_does_not_fit_all_statistics_is_not_taken(measured, monkeypatch):
    problem = a_problem()
    fast = next(c for c in search.candidates(problem.starts()[0], tma=False) if c != problem.starts()[0])
    monkeypatch.setattr(Problem, "starts", lambda self: [pick(configs.table()[self.architecture]["32"], 16), fast])
    monkeypatch.setattr(Workload, "measure", lambda self, c: Timing(c, 1.0 if c == fast else 2.0, 1.0))
    monkeypatch.setattr(Workload, "serves", lambda self, c: c != fast)
    assert chosen(problem) == problem.starts()[0]


def test_rows_are_shared_by_what_loses_least_on_all_shapes(monkeypatch):
    a, b, c = (GemmConfig(**{**ROW, "GROUP": group}) for group in (1, 2, 4))
    monkeypatch.setattr(Problem, "starts", lambda self: [c])
    monkeypatch.setattr(Workload, "serves", lambda self, config: True)
    # by vocabulary size: a and b are best once each, and b loses less elsewhere
    times = {40: {a: 1.0, b: 1.1, c: 2.0}, 41: {a: 1.5, b: 1.0, c: 1.2}}
    monkeypatch.setattr(Workload, "measure", lambda self, config: Timing(config, times[self.problem.vocab_size][config], 0.0))
    results = [
        export.Result(a_problem(vocab_size=v), [Timing(best, times[v][best], 0.0)], 1.0) for v, best in ((40, a), (41, b))
    ]
    assert export.compromise(results) == b
    assert export.compromise(results[:1]) == a


def test_what_the_command_measures_can_replace_the_table(measured, tmp_path, capsys):
    file = tmp_path / "new" / "configs.json"
    shapes = ["tokens=20,hidden=16,vocab=40", "tokens=9,hidden=16,vocab=40,softcap=1"]
    command = ["tune", *(word for s in shapes for word in ("--shape", s)), "--dtype", "fp32", "--export", str(file)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "torch.mm takes" in printed
    assert f"wrote {file}" in printed
    problems = [a_problem(softcap=True), a_problem(num_tokens=32)]
    cached = [read(p.path(), p) for p in problems]
    assert len(measured) == 2 * search.LIMIT
    assert [chosen(p) for p in problems] == cached  # what a job with LOGITLESS_AUTOTUNE=1 gets
    assert len(measured) == 2 * search.LIMIT

    entries = json.loads(file.read_text())
    new, old, name = parse(entries), configs.table(), a_problem().architecture
    rows = new[name]["32"]
    assert [row.max_tokens for row in rows] == [16, None]
    assert [replace(pick(rows, n), max_tokens=None) for n in (9, 16, 17, 10**6)] == [cached[0], cached[0], cached[1], cached[1]]
    assert new[name]["16"] == old[name]["16"]
    assert {k: v for k, v in new.items() if k != name} == {k: v for k, v in old.items() if k != name}
    for part in (device_name(a_problem().device), "Triton 3.", f"torch {torch.__version__}", "N=32 H=16 V=40"):
        assert part in entries[name]["source"]


def test_rows_for_fewer_tokens_than_were_measured_stay(monkeypatch, tmp_path):
    name = a_problem().architecture
    few, some = {**ROW, "max_tokens": 64, "GROUP": 1}, {**ROW, "max_tokens": 8192, "GROUP": 2}
    file = tmp_path / "configs.json"
    file.write_text(json.dumps({name: {"source": "a test", "16": [ROW], "32": [few, some, ROW]}}))
    monkeypatch.setattr(export, "TABLE", file)
    best = GemmConfig(**{**ROW, "GROUP": 4})
    result = export.Result(a_problem(num_tokens=8192), [Timing(best, 1.0, 1.0)], 1.0)
    assert [row.GROUP for row in parse(json.loads(export.export([result], "a GPU")))[name]["32"]] == [1, 4]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("tokens=8,hidden=16", "has no vocab"),
        ("tokens=8,hidden=16,vocabulary=40", "got 'vocabulary'"),
        ("tokens=8,tokens=8,hidden=16,vocab=40", "once, got 'tokens'"),
        ("tokens=0,hidden=16,vocab=40", "tokens must be a positive integer, got '0'"),
        ("tokens=8,hidden=16,vocab=4e4", "vocab must be a positive integer, got '4e4'"),
        ("tokens=8,hidden=16,vocab=40,softcap=30", "softcap must be 0 or 1, got '30'"),
    ],
)
def test_a_wrong_shape_is_an_error_that_says_what_is_accepted(shape, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["tune", "--shape", shape])
    assert message in capsys.readouterr().err


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU has bfloat16")
def test_the_command_says_why_it_cannot_run(capsys):
    assert main(["tune", "--shape", "tokens=8,hidden=16,vocab=40"]) == 1
    assert "logitless tune cannot run: Triton's interpreter computes nothing in bfloat16" in capsys.readouterr().err


def test_env_says_where_configurations_come_from(measured, monkeypatch):
    assert f"configurations measured once, cached in {configs.cache_folder()}" in env._backends()["triton"]
    monkeypatch.delenv("LOGITLESS_AUTOTUNE")
    assert "configurations from the table, LOGITLESS_AUTOTUNE is not 1" in env._backends()["triton"]


def test_the_cache_is_in_the_users_folder_for_caches(monkeypatch):
    monkeypatch.delenv("LOGITLESS_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert configs.cache_folder() == Path("/caches/logitless")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert configs.cache_folder() == Path.home() / ".cache" / "logitless"
