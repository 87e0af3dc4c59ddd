"""Ten families in the ordinary suite; all of them behind the marker ``zoo``, with a table by ``make zoo``."""

import math

import pytest

from .examine import examine
from .families import FAMILIES, ORDINARY


def check(family):
    one = FAMILIES[family]
    row = examine(family, one.name, one.size, one.build)
    assert not row.failure
    assert row.left == one.left and row.layers > 2
    assert row.share == 1 or one.left or row.share > 0.99
    assert math.isfinite(row.error) and row.error <= 2 * row.plain_error + 0.02
    assert (row.state, row.files, row.export) == ("yes", "yes", "yes")


@pytest.mark.parametrize("family", ORDINARY)
def test_families_of_the_ordinary_suite(family):
    check(family)


@pytest.mark.zoo
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ORDINARY])
def test_all_other_families(family):
    check(family)
