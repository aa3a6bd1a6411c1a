"""docs/support-matrix.md says what the installed transformers does."""

import json

import pytest
import support_matrix
import transformers
import zoo

RESULTS = json.loads(support_matrix.RESULTS.read_text())


@pytest.mark.parametrize("name", zoo.quick(zoo.ZOO))
def test_as_committed(name):
    version = transformers.__version__
    if version not in RESULTS:
        pytest.skip(f"the matrix has no transformers {version}: python tests/helpers/support_matrix.py")
    committed, measured = dict(RESULTS[version][name]), support_matrix.measure(name)
    error = measured.pop("error", 0.0)
    committed.pop("error", None)  # varies with the machine
    assert measured == committed
    assert error < 1e-4


def test_the_table_is_made_from_the_results():
    assert support_matrix.TABLE.read_text() == support_matrix.table(RESULTS)
