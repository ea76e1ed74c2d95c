"""Methods on a GPU. All of this is skipped where there is none."""
from __future__ import annotations

import copy

import pytest
import torch
from test_joint import sampling
from test_surgery import build, call_of

from pruning.methods import PRUNING, default_options, prune
from pruning.methods.calibration import answer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
OPTIONS = {"recovery_steps": 2, "allocation": "guided", "refit": True, "pattern": "2:4"}


@pytest.mark.parametrize(("family", "method", "option"), [
    (family, method, option) for family in ("sd15", "sd3") for method in PRUNING for option in (None, *OPTIONS)
    if (option is None or option in default_options(method)) and (family, method) != ("sd15", "modulation")])
def test_a_gpu_prunes_as_a_cpu_does(family, method, option):
    """Rounding may choose another unit or weight, so the counts are equal and the outputs near."""
    dense = build(family)
    recorded, outputs, counts = sampling(dense), [], []
    options = {option: OPTIONS[option]} if option else {}
    for device in ("cpu", "cuda"):
        for rate in (0.0, 0.5):
            model = copy.deepcopy(dense).to(device)
            done = prune(method, model, rate, calibration=recorded, **options)
            counts.append((done.total, done.asked, done.taken))
            with torch.no_grad():
                outputs.append(answer(model, call_of(dense)).cpu())
    for cpu, cuda in zip(counts[:2], counts[2:]):
        assert cpu == pytest.approx(cuda, rel=0.02 if method == "joint" else 0)  # what a budget buys comes in lumps
    assert (outputs[0] - outputs[2]).norm() < 1e-2 * outputs[0].norm()
    assert (outputs[1] - outputs[3]).norm() < 0.3 * outputs[1].norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", PRUNING)
def test_half_precision_prunes_on_a_gpu(method, dtype):
    dense = build("sd3" if method == "modulation" else "sd15").to("cuda", dtype)
    done = prune(method, dense, 0.5, calibration=sampling(dense))
    assert done.taken == pytest.approx(done.asked, rel=0.05, abs=8)
    with torch.no_grad():
        assert answer(dense, call_of(dense)).isfinite().all()
