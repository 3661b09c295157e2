"""How cost grows: laws are found where there are some, what breaks one is told, and the figures can be drawn."""

import argparse
import json
import os
import runpy
import subprocess
import sys

import documented
import numpy as np
import pytest

BENCH = documented.ROOT / "scripts/bench"
growth = argparse.Namespace(**runpy.run_path(str(BENCH / "growth.py")))
draw = argparse.Namespace(**runpy.run_path(str(documented.ROOT / "scripts/studies/draw_results.py")))


def rounds(costs: dict[float, float], noise: float = 0.02) -> dict[float, list[float]]:
    rng = np.random.default_rng(0)
    return {x: (y * (1 + noise * rng.standard_normal(7))).tolist() for x, y in costs.items()}


@pytest.mark.parametrize(("a", "b"), [(5.0, 0.2), (0.0, 3.0), (40.0, 0.0)])
def test_a_linear_cost_gives_back_its_law_and_does_not_miss_it(a, b):
    found = growth.law_of(rounds({x: a + b * x for x in (1, 10, 100, 1000, 10_000)}))
    # A part that is nowhere a visible share of the cost can't be told from none.
    assert found["a"] == pytest.approx(a, rel=0.1, abs=0.1) and found["b"] == pytest.approx(b, rel=0.1, abs=1e-3)
    assert abs(found["off"]) < 0.1


def test_a_square_cost_has_exponent_two_and_is_far_off_a_line():
    found = growth.law_of(rounds({x: 0.01 * x**2 for x in (1, 4, 16, 64, 256, 1024)}))
    middle, low, high = found["exponent"]
    assert low <= middle <= high and low == pytest.approx(2, abs=0.05) and high == pytest.approx(2, abs=0.05)
    assert abs(found["off"]) > 0.5


def test_chips_come_from_the_compilers_figures():
    assert {x for x in growth.chips()} == {16.0, 64.0, 256.0}
    assert all(len(costs) == 1 and costs[0] > 0 for costs in growth.chips().values())


def test_the_figures_have_a_table_and_a_picture_with_a_panel_a_curve():
    points = [[x, x + 1, x + 1.1] for x in (1, 10, 100)]
    curves = [{"name": name, "points": points, "load": [0.5, 1.5]} for name in list(growth.CURVES)[:4]]
    study = growth.study(curves, argparse.Namespace(rounds=2, machine="two cores", curves=""))
    assert study["machine"] == "two cores; loads 0.5 to 1.5"
    assert draw.markdown(study).count("\n") == 5
    picture = draw.draw(study, "cost")
    assert all(f">{curve['name']}<" in picture for curve in curves)


def test_every_curve_but_chips_can_be_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    curves = runpy.run_path(str(BENCH / "growth_curves.py"))["curves"]()
    sys.modules.pop("growth", None)
    assert set(curves) == set(growth.CURVES) - {"chips"}
    assert all(len(curve.small) == 3 <= len(curve.points) for curve in curves.values())


@pytest.mark.slow
@pytest.mark.parametrize("curve", [name for name in growth.CURVES if name != "chips"])
def test_a_curve_is_measured(curve, tmp_path):
    command = [
        sys.executable,
        BENCH / "growth.py",
        "--small",
        "--rounds=1",
        f"--output={tmp_path}",
        f"--curves={curve}",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(documented.ROOT)}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["curve"] == curve
    found = json.loads((tmp_path / f"{curve.replace(' ', '_')}.json").read_text())
    assert len(found["points"]) == 3 and all(cost > 0 for _, *costs in found["points"] for cost in costs)
