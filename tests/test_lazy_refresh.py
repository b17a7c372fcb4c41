"""Refreshing only what has moved: the statistic, the gaps that follow from it, and a run that can be resumed."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import galore_fx
from galore_fx.runtime.subspace.bases import exact_basis, random_basis, sketch_of
from galore_fx.runtime.subspace.projected_parameter import GradientForm
from galore_fx.runtime.subspace.projection import ProjectedDim, project
from galore_fx.runtime.subspace.refresh_criteria import LazyGaps, first_vector_cosine, gradient_overlap, sketch_overlap
from galore_fx.runtime.subspace.refresh_queue import FixedSchedule, RefreshLimits, RefreshQueue
from tests.models import adamw, backward, batches, llama, straight_and_resumed

pytestmark = pytest.mark.usefixtures("without_kernels")

ROWS, COLS = ProjectedDim.ROWS, ProjectedDim.COLS


def gradient_in(basis, dim, seed=0):
    """A 40 x 30 gradient whose rows or columns lie in the span of a basis."""
    size, rank = basis.shape
    shape = (rank, 30) if dim is ROWS else (40, rank)
    inner = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return basis @ inner if dim is ROWS else inner @ basis.T


@pytest.mark.parametrize("dim", [ROWS, COLS])
def test_overlap_is_one_in_the_same_subspace_and_zero_by_chance(dim):
    size, rank = (40 if dim is ROWS else 30), 6
    basis = random_basis((size, rank), torch.Generator().manual_seed(1))
    inside = gradient_in(basis, dim)
    new = exact_basis(inside, rank, dim)
    turned = new @ random_basis((rank, rank), torch.Generator().manual_seed(2))  # the same span, other vectors
    for old in (basis, new, -new, turned):
        assert gradient_overlap(inside, old, new, dim) == pytest.approx(1, abs=1e-4)
        assert sketch_overlap(old, sketch_of(inside, old, dim)) == pytest.approx(1, abs=1e-4)
    assert first_vector_cosine(new, -new) == pytest.approx(1, abs=1e-5)
    by_chance = []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(40, 30, generator=generator)
        old, new = random_basis((size, rank), generator), exact_basis(noise, rank, dim)
        by_chance.append(gradient_overlap(noise, old, new, dim))
    assert abs(sum(by_chance) / len(by_chance)) < 0.02


def test_overlap_is_weighted_by_energy():
    """Losing a direction that holds a hundredth of the energy costs a hundredth."""
    old = torch.eye(20)[:, :2]
    grad = torch.zeros(30, 20)
    grad[0, 0], grad[1, 5] = 10.0, 1.0
    overlap = gradient_overlap(grad, old, exact_basis(grad, 2, COLS), COLS)
    assert overlap == pytest.approx(1 - (1 / 101) / (1 - 2 / 20), abs=1e-6)
    assert project(grad, old, COLS).square().sum() == 100


@given(
    values=st.lists(st.floats(0, 1), min_size=1, max_size=60),
    base=st.integers(1, 50),
    size=st.integers(1, 6),
    largest=st.integers(1, 9),
)
def test_gaps_double_on_a_stable_mean_and_never_exceed_their_limit(values, base, size, largest):
    gaps = LazyGaps(base, 0.5, size, largest)
    for position, value in enumerate(values):
        before = gaps.gap_of(0)
        gaps.note(0, value)
        recent = values[max(0, position + 1 - size) : position + 1]
        stable = len(recent) == size and sum(recent) / size >= 0.5
        wanted = 2 * before if stable and 2 * before <= largest * base else before
        assert gaps.gap_of(0) == wanted and gaps.stabilities[0] == recent


def run(stable, num_updates=200, gap=5, queue_size=2, largest=8, limit=None):
    """The updates in which each of two weights of one layer refreshes; ``stable`` says which of them stays."""
    schedule = FixedSchedule(gap, 1, stagger=False, num_initial=1)
    queue = RefreshQueue({0: 0, 1: 0}, schedule, RefreshLimits(limit), LazyGaps(gap, 0.5, queue_size, largest))
    times = {0: [], 1: []}
    for update in range(num_updates):
        queue.admit(update)
        for key in queue.turn():
            if queue.measures(update):
                queue.criterion.saw_refresh(key, float(key in stable))
            times[key].append(update)
            queue.finish(key)
    return times


def test_a_stable_weight_refreshes_less_and_less_and_its_neighbour_as_before():
    times = run(stable={1})
    assert times[0] == list(range(0, 200, 5))
    assert times[1] == [0, 5, 10, 20, 40, 80, 120, 160]  # two measurements, then gaps of 10, 20, 40: the limit


def test_a_layer_takes_the_refreshing_form_as_a_whole_and_renews_what_is_due():
    model = galore_fx.compile(
        llama(1), rank=8, refresh="lazy", refresh_gap=2, lazy_queue=1, stagger=False, optimizer=adamw(), basis="svd"
    )
    optimizer, ids = model.galore_fx.optimizer, batches(1)[0]
    records = list(optimizer.records)
    lazy = optimizer.refreshes.queue.criterion
    lazy.gaps = {id(record.weight): 100 for record in records[1:]}
    for _ in range(2):
        backward(model, ids)
        optimizer.step()
    bases = [record.basis.clone() for record in records]
    assert {record.form for record in records} == {GradientForm.FULL}, "all deliver full gradients"
    backward(model, ids)
    optimizer.step()
    changed = [not torch.equal(record.basis, before) for record, before in zip(records, bases, strict=True)]
    assert changed == [True] + [False] * (len(records) - 1)
    assert model.galore_fx.stats()["num_region_variants"] == 2
    assert model.galore_fx.stats()["refresh_gap"][records[1].name] == 100
    assert list(model.galore_fx.stats()["stability"]) == [records[0].name]


@pytest.mark.parametrize("settings", [{"basis": "svd"}, {"lazy_statistic": "first-vector", "update": "in-backward"}])
def test_a_resumed_run_decides_the_same(settings):
    def make():
        settings_ = {"refresh": "lazy", "refresh_gap": 2, "lazy_queue": 2, "lazy_threshold": 0.3, **settings}
        return galore_fx.compile(llama(2), rank=8, optimizer=adamw(), **settings_)

    ids = batches(14)
    straight, resumed = straight_and_resumed(make, ids, 9)
    expected, given = straight.galore_fx.stats(), resumed.galore_fx.stats()
    for figure in ("num_refreshes", "refresh_gap", "stability"):
        assert given[figure] == expected[figure]
    assert max(given["refresh_gap"].values()) > 2
