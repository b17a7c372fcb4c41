"""A sample of the families of docs/models.md: two decoders, an encoder, an encoder-decoder; one step each."""

import pytest

from tools.lab.model_families import FAMILIES, train_family

pytestmark = pytest.mark.usefixtures("without_kernels")


@pytest.mark.parametrize(
    ("name", "num_projected", "num_graphs"),
    [pytest.param("Falcon", 8, 1, marks=pytest.mark.kernels), ("OPT", 12, 1), ("DistilBERT", 12, 1), ("T5", 32, 4)],
)
def test_gradients_are_projected_and_the_loss_falls(name, num_projected, num_graphs):
    report = train_family(FAMILIES[name], num_steps=1)
    assert report.worst_error < 1e-4
    assert report.num_full == 0
    assert report.losses[-1] < report.losses[0]
    assert (report.num_projected, report.num_graphs, report.uncompiled) == (num_projected, num_graphs, [])
    assert not report.has_logits
    assert 0.5 < report.share < 1


def test_the_page_has_all_of_them():
    from pathlib import Path

    page = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
    assert len(FAMILIES) == 15
    assert all(f"| {name} " in page for name in FAMILIES)
