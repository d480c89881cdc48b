"""The GEMM kernels with an epilogue against float64: blocks of logits, over shapes, heads, strides and configurations."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import logitless as ll
from logitless.kernels.core.stats import OPTIONAL_OUTPUTS, OUTPUTS, CoreOptions, RowStats

from ..helpers import Case, gradients, make_case, plain_logps, relative_error, run_op, run_reference
from .conftest import DEVICE, moved, replace_in_backend

pytest.importorskip("triton")
from logitless.kernels.backends.triton import backend as triton_backend
from logitless.kernels.backends.triton.finish import finish_blocks
from logitless.kernels.backends.triton.gemm import launch
from logitless.kernels.backends.triton.gemm.combine import STATS
from logitless.kernels.backends.triton.gemm.config import GemmConfig
from logitless.kernels.backends.triton.targets import target_logit_and_slope
from logitless.kernels.backends.triton.tuning.configs import table
from logitless.kernels.operators.schemas import new_sums

#: NumPy's, in the interpreter.
pytestmark = [
    pytest.mark.blas,
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Casting complex:RuntimeWarning"),
]
quick = settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
CONFIG = table()["interpreter"]["32"][0]
PLAIN, SCALED, SOFTCAP = ll.HeadSpec(), ll.HeadSpec(0.7, None, 1.3), ll.HeadSpec(1.2, 8.0, 0.6)
HEADS = [PLAIN, SCALED, SOFTCAP]
ALL = frozenset(OPTIONAL_OUTPUTS)
#: Of statistics, relative to 1 + |value|, as the tests of every backend have it; sums of fp16 inputs are of float32.
LIMIT = 2e-5


@pytest.fixture(autouse=True, scope="module")
def backend():
    with ll.settings(backend="triton"):
        yield


@dataclass
class Rows:
    """What the kernels are given. x (N, H), weight (V, H), bias (V,) or None, labels (N,)."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor

    def __iter__(self):
        return iter((self.x, self.weight, self.bias, self.labels))

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.x), len(self.weight)

    def raw(self) -> Tensor:
        """Raw logits (N, V), float64."""
        raw = self.x.double() @ self.weight.to(self.x.dtype).double().t()
        return raw if self.bias is None else raw + self.bias.double()


def some_rows(n=37, hidden=24, vocab=150, dtype=torch.float32, bias=True, seed=0, scale=0.5) -> Rows:
    g = torch.Generator().manual_seed(seed)
    x, w, b = (torch.randn(shape, generator=g) for shape in ((n, hidden), (vocab, hidden), (vocab,)))
    labels = torch.randint(vocab, (n,), generator=g)
    return Rows(*(moved(t.to(dtype)) for t in (x, w * scale)), moved(b.to(dtype)) if bias else None, moved(labels))


def exact_rows(n=37, hidden=24, vocab=150, seed=0) -> Rows:
    """Multiples of 1/8 so small that float32 holds every partial sum of a logit: any order of summation gives the same bits."""
    g = torch.Generator().manual_seed(seed)
    x, w, b = (torch.randint(-8, 9, shape, generator=g) / 8 for shape in ((n, hidden), (vocab, hidden), (vocab,)))
    labels = torch.randint(vocab, (n,), generator=g)
    return Rows(*map(moved, (x, w, b, labels)))


def with_rivals(rows: Rows, rivals: dict[int, int], gap: float) -> Rows:
    """Row ``i``, and no other, has a logit ``gap`` above its label's, at ``rivals[i]``: each such row has a dimension more."""
    x, w = (torch.nn.functional.pad(t, (0, len(rivals))) for t in (rows.x, rows.weight))
    raw = rows.raw()
    for j, (row, rival) in enumerate(rivals.items(), rows.x.shape[1]):
        x[row, j] = 1
        w[rival, j] = gap - raw[row, rival] + raw[row, rows.labels[row]]
    return Rows(x, w, rows.bias, rows.labels)


def score(
    rows: Rows, head=PLAIN, outputs=ALL, *, config=CONFIG, width=None, precision="auto", tile=None, rounding=0.0
) -> dict[str, Tensor]:
    """``score_block`` of blocks of ``width`` entries, with target logits less ``rounding``; the statistics by name."""
    (n, vocab), (x, weight, bias, labels) = rows.shape, rows
    width = vocab if width is None else width
    options = CoreOptions(frozenset(outputs), precision)
    zy, start, _ = target_logit_and_slope(x, weight, bias, labels, precision, head)
    zy, start = zy - rounding, start - rounding
    stats = torch.full((len(STATS), n), torch.nan, dtype=torch.float32, device=x.device)
    top1 = torch.zeros(n, dtype=torch.bool, device=x.device)
    sums, k = (None if width == vocab else new_sums(n, x.device)), start.clone()
    for v0 in range(0, vocab, width):
        w, b = weight[v0 : v0 + width], None if bias is None else bias[v0 : v0 + width]
        given = x, w, b, labels, zy, k, sums, stats, top1 if "is_top1" in outputs else None, head, options, config
        part = None if tile is None else tile[:, v0 : v0 + width]
        factors, _ = launch.score_block(*given, first=v0, vocab_size=vocab, start=start, gradient=part)
        if part is not None:
            assert width == vocab
            finish_blocks(part, factors, labels, None, config.BLOCK_V)
    found = {name: value for name, value in zip(STATS, stats, strict=True) if name not in ALL or name in outputs}
    return found | {"k": k, "zy": zy} | ({"is_top1": top1} if "is_top1" in outputs else {})


def expected_stats(rows: Rows, head=PLAIN) -> dict[str, Tensor]:
    x, weight, bias, labels = rows
    return ll.reference_logps(x, weight.to(x.dtype), labels, bias, head)._asdict()


def assert_stats(found: dict[str, Tensor], expected: dict[str, Tensor], limit: float = LIMIT) -> None:
    for name in ("logps", *ALL):
        if name == "is_top1":
            assert torch.equal(found[name], expected[name])
            continue
        value, exact = found[name].double(), expected[name]
        same = value == exact  # infinities
        assert (((value - exact).abs() / (1 + exact.abs()))[~same] <= limit).all(), name


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name in one:
        assert torch.equal(one[name], other[name]), name


@quick
@given(
    n=st.integers(1, 40),
    hidden=st.integers(1, 40),
    vocab=st.integers(1, 140),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    head=st.sampled_from([*HEADS, ll.HeadSpec(-0.7, None, 0.8)]),
    bias=st.booleans(),
    peaked=st.sampled_from([0.0, 12.0, -60.0]),
    train=st.sampled_from(["h", "hw", "hwb", "w"]),
    seed=st.integers(0, 5),
)
@example(n=1, hidden=1, vocab=1, dtype=torch.float32, head=PLAIN, bias=False, peaked=0.0, train="hw", seed=0)
@example(n=1, hidden=16, vocab=64, dtype=torch.float16, head=SOFTCAP, bias=True, peaked=0.0, train="h", seed=0)
@example(n=33, hidden=17, vocab=129, dtype=torch.float32, head=SCALED, bias=True, peaked=-60.0, train="hwb", seed=1)
@example(n=64, hidden=32, vocab=128, dtype=torch.float16, head=PLAIN, bias=False, peaked=12.0, train="hw", seed=2)
def test_shapes_that_are_multiples_of_nothing(n, hidden, vocab, dtype, head, bias, peaked, train, seed):
    train = train if bias else train.replace("b", "")
    case = make_case(
        sequences=1, tokens=n, hidden=hidden, vocab=vocab, dtype=dtype, head=head, bias=bias, peaked=peaked, masked=0.0,
        seed=seed, train=train, scale=0.5,
    ).to(DEVICE)  # fmt: skip
    stats, wide = run_op(case, OUTPUTS), case.double()
    reference = run_reference(wide)
    # H = 1 can tie but for its rounding: what is compared exactly must be clear
    raw = Rows(case.hidden[0], case.weight, case.bias, case.labels[0]).raw().detach() * head.logit_scale
    lead = raw.topk(min(2, vocab), dim=-1).values
    clear = (lead[:, 0] - lead[:, -1] > 1e-4 * (1 + lead[:, 0].abs())) | (vocab == 1)
    if head.softcap is None:
        assert torch.equal(stats.is_top1[0][clear], reference.is_top1[0][clear])
    for name in ("logps", "entropy", "mean_logits", "log_sum_sq_probs"):
        value, exact = getattr(stats, name), getattr(reference, name)
        scale = 1 + exact.abs() + raw.abs().amax() * head.slope * 2**-4  # of a label that is all but ruled out
        assert ((value.double() - exact).abs() / scale).max() <= LIMIT, name
    wanted = [t for t, key in ((wide.hidden, "h"), (wide.weight, "w"), (wide.bias, "b")) if key in train]
    for entropy in (0, 1):
        loss, exact = ((r.logps.sum() * 1.5 + entropy * r.entropy.sum()) for r in (stats, reference))
        for mine, true in zip(gradients(loss, case), torch.autograd.grad(exact, wanted, retain_graph=True), strict=True):
            error = (mine.double() - true).norm()
            assert error <= (LIMIT if dtype == torch.float32 else 2**-10) * true.norm() + 1e-6 * n


def test_labels_at_the_borders_of_blocks():
    rows = some_rows(8, vocab=130)
    rows.labels[:] = torch.tensor([0, 63, 64, 65, 127, 128, 129, 1])
    for head in HEADS:
        assert_stats(score(rows, head), expected_stats(rows, head))
        tile = torch.empty(8, 130, device=DEVICE)
        k = score(rows, head, tile=tile)["k"]
        assert_tile(tile, rows, head, k)


def test_a_vocabulary_of_one_entry_is_certain():
    for head in HEADS:
        case = make_case(vocab=1, masked=0.0, head=head, bias=True).to(DEVICE)
        stats = run_op(case, OUTPUTS)
        assert (stats.logps == 0).all() and (stats.entropy == 0).all() and stats.is_top1.all()
        assert all((g == 0).all() for g in gradients(stats.logps.sum() + stats.entropy.sum(), case))


@pytest.mark.parametrize("head", [PLAIN, SOFTCAP], ids=["plain", "softcap"])
def test_asking_for_a_statistic_changes_no_bit_of_another(head):
    rows = with_rivals(some_rows(), {3: 140, 20: 1}, 90.0)
    everything, tile = score(rows, head), torch.empty(rows.shape, device=DEVICE)
    for outputs in ([], *([name] for name in ALL), ["entropy", "is_top1"]):
        found = score(rows, head, outputs)
        assert set(found) == set(everything) - (ALL - set(outputs))
        assert_same_bits(found, {name: everything[name] for name in found})
    assert_same_bits(score(rows, head, tile=tile), everything)


@pytest.mark.parametrize("head", [PLAIN, SCALED, ll.HeadSpec(1.2, 1.0, 0.8)], ids=["plain", "scaled", "softcap"])
def test_entries_that_the_bias_masks(head):
    """A soft-cap makes an ordinary logit of -inf, as in the definition."""
    rows = some_rows(scale=0.2)
    rows.labels[rows.labels >= 60] = 5
    clean = score(rows, head)
    rows.bias[60:] = -math.inf  # part of a block, and whole ones
    assert_stats(score(rows, head), expected_stats(rows, head))
    before = score(rows, head)
    rows.labels[7] = 100
    after = score(rows, head)
    assert_stats(after, expected_stats(rows, head))
    assert (after["logps"][7] == -math.inf) == (head.softcap is None)
    others = torch.arange(len(rows.x), device=DEVICE) != 7
    assert_same_bits(*({name: value[others] for name, value in found.items()} for found in (before, after)))
    assert not torch.equal(clean["logps"], before["logps"])
    case = Case(rows.x.requires_grad_(), rows.weight.requires_grad_(), rows.bias, rows.labels, head)
    stats, wide = run_op(case, ("logps", "entropy")), case.double()
    keep = others[:, None].float()
    loss, exact = (((s.logps.nan_to_num(neginf=0) + s.entropy) * keep[:, 0]).sum() for s in (stats, run_reference(wide)))
    for mine, true in zip(gradients(loss, case), torch.autograd.grad(exact, [wide.hidden, wide.weight]), strict=True):
        assert relative_error(mine, true) <= LIMIT


RAISES = {
    "the first block": {3: 1},
    "the last block": {3: 149},
    "one of its label's block": {3: 70},
    "several blocks, several rows": {0: 5, 9: 80, 20: 148, 36: 65},
}


@pytest.mark.parametrize(("where", "gap"), [*((where, 200.0) for where in RAISES), ("several blocks, several rows", 40.0)])
def test_a_gap_between_logits_is_the_affair_of_its_row(where, gap):
    rivals = RAISES[where]
    ordinary = some_rows()
    ordinary.labels[3] = 64
    rows = with_rivals(ordinary, rivals, gap)
    calm = Rows(rows.x, torch.cat((ordinary.weight, 0 * rows.weight[:, 24:]), dim=1), rows.bias, rows.labels)
    tiles = [torch.empty(rows.shape, device=DEVICE) for _ in range(2)]
    found, before = score(rows, tile=tiles[0]), score(calm, tile=tiles[1])
    assert_stats(found, expected_stats(rows))
    raised = (found["target_offset"] < -30).nonzero()[:, 0].tolist()
    assert raised == list(rivals)
    assert_tile(tiles[0], rows, PLAIN, found["k"])
    others = [i for i in range(len(rows.x)) if i not in rivals]
    assert_same_bits(*({name: value[others] for name, value in one.items()} for one in (found, before)))
    # what a rival's column holds for other rows is the same logit in both
    assert torch.equal(*(tile[others] for tile in tiles))


@pytest.mark.parametrize("head", [PLAIN, SOFTCAP], ids=["plain", "softcap"])
def test_several_gaps_in_one_row(head):
    """Offsets that rise block after block, or fall; the last one is what counts."""
    rows = some_rows(4, vocab=200)
    for rises in ((10, 80, 140, 199), (199, 140, 80, 10)):
        x, w = rows.x.clone(), rows.weight.clone()
        for step, rival in enumerate(rises):
            w[rival] = x[1] * (60.0 * (step + 1)) / x[1].square().sum()
        wild = Rows(x, w, rows.bias, torch.tensor([150, 150, 10, 0], device=DEVICE))
        found = score(wild, head)
        assert_stats(found, expected_stats(wild, head))
        for width in (64, 128):
            parts = score(wild, head, width=width)
            assert_stats(parts, expected_stats(wild, head))
            assert torch.equal(parts["logps"], found["logps"])


@pytest.mark.parametrize("head", [PLAIN, SOFTCAP], ids=["plain", "softcap"])
def test_no_partition_of_the_vocabulary_changes_a_log_probability(head):
    """A frozen head is scored in several blocks, its reference in one: identical ones must give exactly ln 2."""
    rows = with_rivals(some_rows(60, hidden=13, vocab=200, scale=6.0), {3: 190, 20: 1, 40: 100}, 200.0)
    whole = score(rows, head)
    for width in (64, 128):
        parts = score(rows, head, width=width)
        assert torch.equal(parts["logps"], whole["logps"])
        assert_stats(parts, expected_stats(rows, head))
    if head.softcap is None:
        assert (whole["target_offset"] < -30).sum() > 20


def test_ties_of_the_largest_logit_go_to_the_first_index():
    """The sums are exact, so equal rows of the weight tie. The label is compared as the GEMM made it, like all others."""
    rows = exact_rows(20, hidden=16)
    x, w = rows.x.abs() + 1, rows.weight / 2
    same = [3, 5, 63, 64, 149]  # of one part, of another, of other blocks
    w[same] = 2.0
    for label, head in zip(same, (PLAIN, SOFTCAP, PLAIN, SOFTCAP, SCALED), strict=True):
        rows = Rows(x, w, None, torch.full((20,), label, device=DEVICE))
        for rounding in (0.0, 2**-10):
            assert (score(rows, head, ["is_top1"], rounding=rounding)["is_top1"] == (label == 3)).all()
    assert not score(rows, ll.HeadSpec(-1.0), ["is_top1"])["is_top1"].any()
    rows.labels[:10] = 0
    assert score(rows, ll.HeadSpec(0.0), ["is_top1"])["is_top1"].tolist() == [True] * 10 + [False] * 10


def test_a_saturated_soft_cap():
    """Logits of +-cap, whose slope is 0 in float32 too, beside some that are not capped."""
    rows, head = some_rows(bias=False, scale=100.0), ll.HeadSpec(1.0, 5.0, 0.7)
    rows.weight[::3] *= 1e-3
    found = score(rows, head)
    saturated = (rows.raw().abs() > 100).double().mean()
    assert 0.4 < saturated < 0.9
    expected = expected_stats(rows, head)
    expected["is_top1"] = rows.raw().argmax(dim=1) == rows.labels  # the tanh of float64 ties, where the kernel still tells
    assert_stats(found, expected)
    case = Case(rows.x.requires_grad_(), rows.weight.requires_grad_(), None, rows.labels, head)
    wide = case.double()
    for mine, true in zip(
        gradients(run_op(case).logps.sum(), case), gradients(run_reference(wide).logps.sum(), wide), strict=True
    ):
        assert relative_error(mine, true) <= 10 * LIMIT  # slopes of u = 10 change by a part in 1e5 with u's last bit


@pytest.mark.parametrize(
    "head",
    [ll.HeadSpec(temperature=1e-3), ll.HeadSpec(temperature=100.0), ll.HeadSpec(-1.5), ll.HeadSpec(0.0), ll.HeadSpec(50.0)],
    ids=["cold", "hot", "negative", "zero", "scaled"],
)
def test_extreme_heads_lose_no_more_than_plain_pytorch(head):
    case, plain_case = (make_case(vocab=150, head=head, masked=0.0, tokens=10).to(DEVICE) for _ in range(2))
    wide = case.double()
    ours, plain, true = run_op(case).logps, plain_logps(plain_case), run_reference(wide).logps
    error, its = ((t.double() - true).abs().max() for t in (ours, plain))
    assert error <= 2 * its + 1e-6
    expected = gradients(true.sum(), wide)
    for mine, its, exact in zip(gradients(ours.sum(), case), gradients(plain.sum(), plain_case), expected, strict=True):
        assert relative_error(mine, exact) <= 2 * relative_error(its, exact) + 1e-6


def test_match_rounds_the_logits_to_fp16_once():
    """Of inputs whose sums are exact: what differs is the rounding."""
    g = torch.Generator().manual_seed(0)
    x, w, b = (torch.randint(-32, 33, shape, generator=g).half() / 16 for shape in ((9, 24), (150, 24), (150,)))
    rows = Rows(moved(x), moved(w), moved(b / 64), moved(torch.randint(150, (9,), generator=g)))
    for head in HEADS:
        found, exact = score(rows, head, precision="match"), score(rows, head)
        z = head.apply(rows.raw().half().double())
        logps = z.log_softmax(dim=1).gather(1, rows.labels[:, None])[:, 0]
        assert ((found["logps"] - logps).abs() / (1 + logps.abs())).max() <= 1e-6
        assert (found["logps"] - exact["logps"]).abs().max() > 1e-4


def test_a_weight_of_another_dtype_is_done_in_blocks(monkeypatch):
    """Whose later ones may raise a row's offset: what earlier ones wrote, and the bounds of it, follow."""
    replace_in_backend(monkeypatch, "VOCAB_BLOCK", 64)
    rows = with_rivals(some_rows(dtype=torch.float16, scale=0.2), {3: 149, 20: 70, 30: 1}, 40.0)
    wide = rows.weight.float() * 1.0001
    options, tiles = CoreOptions(ALL, grad_filter=1e-6), [torch.empty(rows.shape, device=DEVICE) for _ in range(2)]
    one, other = (
        triton_backend.score(rows.x, w, rows.bias, rows.labels, PLAIN, options, tile=tile)
        for w, tile in zip((wide, wide.half()), tiles, strict=True)
    )
    for name in ("logps", "k", "is_top1", "sum_others"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert (one.target_offset < -30).nonzero()[:, 0].tolist() == [3, 20, 30]
    assert_stats(vars(one), expected_stats(Rows(rows.x, wide, rows.bias, rows.labels)))
    torch.testing.assert_close(*tiles, rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(one.block_max, other.block_max, rtol=1e-5, atol=1e-30)
    # on a GPU the tile has the labels' entries
    tiles[1][torch.arange(len(rows.x)), rows.labels] = 0
    largest = torch.stack([block.amax(dim=1) for block in tiles[1].split(64, dim=1)], dim=1)
    torch.testing.assert_close(one.block_max, largest, rtol=1e-5, atol=1e-30)


def test_any_strides_give_the_same_bits():
    rows = some_rows()
    expected = statistics(rows)
    wide = torch.randn(len(rows.x), 3, 48, device=DEVICE)
    wide[:, 1, ::2] = rows.x
    biases = torch.randn(150, 3, device=DEVICE)
    biases[:, 1] = rows.bias
    transposed, cut = rows.weight.t().contiguous().t(), torch.cat((rows.weight,) * 2, dim=1)[:, 24:]
    assert_same_bits(statistics(Rows(wide[:, 1, ::2], transposed, biases[:, 1], rows.labels.int())), expected)
    assert_same_bits(statistics(Rows(rows.x.t().contiguous().t(), cut, rows.bias, rows.labels)), expected)
    assert not launch._describable(rows.x[:1].expand(9, -1))
    same = Rows(rows.x[:1].expand(9, -1), rows.weight, rows.bias, rows.labels[:9])
    assert_same_bits(statistics(same), statistics(Rows(same.x.contiguous(), *list(same)[1:])))


def statistics(rows: Rows) -> dict[str, Tensor]:
    """All outputs of the op and the gradients."""
    x, weight, bias = (t.detach().requires_grad_() for t in (rows.x, rows.weight, rows.bias))
    stats = ll.linear_logps(x, weight, rows.labels, bias, outputs=OUTPUTS)
    grads = torch.autograd.grad(stats.logps.sum() + stats.entropy.sum(), (x, weight, bias))
    return stats._asdict() | dict(zip(("dx", "dw", "db"), grads, strict=True))


def assert_tile(tile: Tensor, rows: Rows, head: ll.HeadSpec, k: Tensor) -> None:
    """G but for the labels' entries, which are 0."""
    raw = rows.raw().requires_grad_()
    z = head.apply(raw)
    (slope,) = torch.autograd.grad(z.sum(), raw)
    expected = ((z - k.double()[:, None]).exp() * slope / head.slope).detach()
    expected[torch.arange(len(k)), rows.labels] = 0
    assert ((tile.double() - expected).abs() <= 1e-4 * expected + 1e-30).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("hidden", [32, 19])
def test_descriptors_and_pointers_give_the_same_bits(dtype, hidden):
    rows = with_rivals(some_rows(hidden=hidden - 1, dtype=dtype, vocab=131), {5: 130}, 60.0)
    outcomes = []
    for tma in (False, True):
        config = replace(CONFIG, tma=tma, BLOCK_H=16)
        described = launch._operands(rows.x, rows.weight, config)[2]
        assert described == (tma and hidden != 19)
        outcomes.append(both_passes(rows, config))
    assert_same_bits(*outcomes)


@pytest.mark.parametrize(
    ("hidden", "stride", "start", "aligned"),
    [(32, 32, 0, True), (32, 48, 16, True), (32, 40, 0, False), (32, 33, 0, False), (40, 48, 0, False), (32, 48, 1, False)],
)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_operands_that_are_not_aligned_get_smaller_blocks_and_the_same_results(
    hidden, stride, start, aligned, softcap, monkeypatch
):
    """Aligned is what Triton specialises for: addresses, strides and the hidden size are multiples of 16."""
    launched = []
    for_unaligned = GemmConfig.for_unaligned
    monkeypatch.setattr(GemmConfig, "for_unaligned", lambda self: launched.append(self) or for_unaligned(self))
    rows = some_rows(9, hidden=hidden, vocab=131)
    memory = torch.zeros(len(rows.weight) * stride + 64, device=DEVICE)
    start += -(memory.data_ptr() // 4) % 16
    weight = memory.as_strided(rows.weight.shape, (stride, 1), start)
    weight.copy_(rows.weight)
    config, head = replace(CONFIG, tma=False, BLOCK_H=32), ll.HeadSpec(softcap=softcap)
    found = both_passes(replace(rows, weight=weight), config, head)
    assert launched == ([] if aligned else [config] * 2)
    expected = both_passes(rows, replace(config, BLOCK_H=16), head)
    for name, values in found.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def both_passes(rows: Rows, config, head=PLAIN) -> dict[str, Tensor]:
    tile, gradient = (torch.full(rows.shape, torch.nan, device=DEVICE) for _ in range(2))
    found = score(rows, head, config=config, tile=tile)
    ones = torch.ones(len(rows.x), device=DEVICE)
    launch.recompute_block(*rows, found["k"], None, None, ones, gradient, head, CoreOptions(), config, first=0)
    assert torch.isfinite(gradient).all()
    return found | {"tile": tile, "gradient": gradient}


def test_any_number_of_programs_in_any_order_gives_the_same_bits():
    """Blocks are not a multiple of the programs, nor blocks of tokens of those that share weight rows."""
    rows = with_rivals(some_rows(70, hidden=15, vocab=130), {5: 129, 60: 2}, 60.0)
    expected = both_passes(rows, replace(CONFIG, programs_per_sm=1, GROUP=1))
    for programs, group in ((4, 2), (100, 16)):
        assert_same_bits(both_passes(rows, replace(CONFIG, programs_per_sm=programs, GROUP=group)), expected)


@pytest.mark.parametrize("shape", [(16, 16, 16, 16), (64, 32, 32, 8), (16, 128, 16, 128)])
def test_any_blocks_give_the_same_statistics(shape):
    names = ("BLOCK_N", "BLOCK_V", "BLOCK_H", "PART")
    config = replace(CONFIG, **dict(zip(names, shape, strict=True)), SOFTCAP_PART=shape[-1])
    rows = with_rivals(some_rows(), {5: 130, 30: 2}, 60.0)
    for head in (PLAIN, SOFTCAP):
        tile = torch.empty(rows.shape, device=DEVICE)
        found = score(rows, head, config=config, tile=tile)
        assert_stats(found, expected_stats(rows, head))
        assert_tile(tile, rows, head, found["k"])


def test_row_statistics_are_one_call_wide():
    """``RowStats.cat`` of chunks is what one chunk gives: a token does not depend on how many are done together.

    The logits are exact: a matrix product may sum in another order where a row has another place.
    """
    rows = with_rivals(exact_rows(100), {5: 130, 70: 2}, 60.0)
    options = CoreOptions(ALL)
    x, weight, bias, labels = rows
    whole = triton_backend.score(x, weight, bias, labels, PLAIN, options)
    chunks = triton_backend.score(x, weight, bias, labels, PLAIN, replace(options, workspace=1))
    parts = [triton_backend.score(x[i : i + 9], weight, bias, labels[i : i + 9], PLAIN, options) for i in range(0, 100, 9)]
    for other in (chunks, RowStats.cat(parts)):
        for name in ("logps", "k", "sum_others", "log_denom", "target_offset", *ALL):
            assert torch.equal(getattr(whole, name), getattr(other, name)), name
