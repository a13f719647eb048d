"""The example of a stack of one's own runs, is short, and says what its page says."""

import re
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
EXAMPLE, PAGE = ROOT / "examples" / "own_stack.py", ROOT / "docs" / "own_stack.md"


@pytest.mark.slow
def test_own_stack(capsys):
    """Every correction is exact after as many iterations as layers; a calibrated one is the best before that."""
    assert len(EXAMPLE.read_text().splitlines()) < 60
    with jax.numpy_rank_promotion("allow"):  # a user's code need not spell out every axis
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    header, *lines = capsys.readouterr().out.splitlines()
    numbers = {line[:27].strip(): [float(cell) for cell in line[27:].split()] for line in lines}
    assert re.findall(r"k=(\d+)", header) == ["1", "2", "4", "12"] and len(numbers) == 4
    for errors in numbers.values():
        assert errors[-1] < 1e-5  # float32 rounding of twelve layers
        assert all(later < earlier for earlier, later in zip(errors, errors[1:], strict=False))
    *others, calibrated = numbers.values()
    assert all(calibrated[column] < min(row[column] for row in others) for column in range(3))
    assert all(name in PAGE.read_text() for name in numbers)


def test_the_code_of_the_page_runs():
    """In the names of the example. Over four devices the layers are solved as on one."""
    names = runpy.run_path(str(EXAMPLE))
    with jax.numpy_rank_promotion("allow"):
        for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
            exec(code, names)
    assert names["found"].error.shape == (5, 12) and names["norms"].shape == names["left"].shape == (12,)
    assert names["solution"].result.shape == (256,)
    # Sums of float32 in another order.
    np.testing.assert_allclose(names["spread"].value, names["solution"].value, rtol=1e-4, atol=1e-4)
