"""The official XDLM code beside ours on the same tensors: loss forward and backward, and one reverse step.

    git clone https://github.com/MzeroMiko/XDLM ~/XDLM
    python benchmarks/official.py --checkout ~/XDLM [--device cuda] [--width 16387] [--rows N] [--repeats 7]

Runs `xdm_utils.py` of the checkout (`XDMHelper.get_kl`, `XDMHelper.sample_one_step` and the race of exponentials that
draws from it), in definition B as there: v ids, of which the mask is one and two are no codes. That both give the same
loss is asserted before they are timed. All take turns in one process; the JSON lands beside this file.
"""

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import torch
from measuring import images_of, machine, measure, parser_of, prepare, show

from xdlm_image import XDLMScheduler
from xdlm_image.files import write_json
from xdlm_image.objective import xdlm_nelbo

SPECIAL = 3  # mask and beginning of a sequence in one, end, and one without a name: the official ids beside the codes


def load_official(checkout: Path) -> ModuleType:
    """`xdm_utils.py` of a checkout, as a module; its code is run."""
    spec = importlib.util.spec_from_file_location("official_xdm_utils", checkout / "xdm_utils.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def candidates_of(helper, rows: int, arguments) -> tuple[dict, dict]:
    """Losses and reverse steps, by name."""
    v, device, k = arguments.width, arguments.device, arguments.k
    mask = v - SPECIAL
    batch, length = images_of(rows)
    scheduler = XDLMScheduler(k=k, num_codes=mask, definition="B", vocab_size=v, mask_id=mask)
    scheduler.set_timesteps(8)
    t, s = scheduler.timesteps[4], scheduler.timesteps[5]
    logits = torch.randn(batch, length, v, device=device).to(arguments.dtype).requires_grad_()
    x = torch.randint(mask, (batch, length), device=device)
    times = torch.linspace(0.05, 0.95, batch, dtype=torch.float64).to(device, torch.float32)
    alpha, beta = scheduler.process.alpha_beta(times)
    z = scheduler.process.noise(x, alpha, beta)
    z_t = scheduler.add_noise(x, t.expand(batch))

    def official_loss():
        return helper.get_kl(
            logits=logits, inputs=z, labels=x, mask_id=mask, k1=k, alpha_t=alpha[:, None], alpha_s=alpha[:, None],
            delta_alpha_scale=torch.ones_like(alpha)[:, None],
        )  # fmt: skip

    def our_loss():
        return xdlm_nelbo(logits, z, x, scheduler.process, alpha, beta)

    with torch.no_grad():
        difference = (official_loss() - our_loss()).abs() / (1.0 + our_loss().abs())
    assert float(difference.max()) < 2e-2, f"the losses differ by {float(difference.max()):.3g}"

    def trained(loss):
        def once():
            loss().mean().backward()
            logits.grad = None

        return once

    @torch.no_grad()
    def official_step():
        alphas = (torch.full((batch, 1), 1.0 - float(time), device=device) for time in (t, s))
        probs = helper.sample_one_step(logits, z_t, k, mask, *alphas)
        race = 1e-10 - (torch.rand_like(probs) + 1e-10).log()
        return (probs / race).argmax(-1)

    generators = [torch.Generator().manual_seed(i) for i in range(batch)]

    @torch.no_grad()
    def our_step():
        return scheduler.step(logits, t, z_t, generators).prev_sample

    targets = x.view(-1)
    losses = {
        "official": trained(official_loss),
        "ours": trained(our_loss),
        "cross_entropy": trained(lambda: torch.nn.functional.cross_entropy(logits.view(-1, v), targets)),
    }
    return losses, {"official": official_step, "ours": our_step}


def main() -> None:
    parser = parser_of(__file__, __doc__)
    parser.add_argument("--checkout", type=Path, required=True, help="of the official repository")
    parser.add_argument("--width", type=int, default=16387, help="ids, the three special ones among them")
    parser.add_argument("--k", type=float, default=0.1)
    arguments = parser.parse_args()
    prepare(arguments)
    if not (arguments.checkout / "xdm_utils.py").is_file():
        parser.error(f"--checkout {arguments.checkout}: no xdm_utils.py there; clone https://github.com/MzeroMiko/XDLM")
    rows = math.prod(images_of(arguments.rows or arguments.elements // arguments.width))
    losses, steps = candidates_of(load_official(arguments.checkout).XDMHelper, rows, arguments)
    result = machine(arguments) | {"k": arguments.k, "width": arguments.width, "rows": rows}
    unit = rows * arguments.width * arguments.dtype.itemsize
    for name, candidates in (("loss, forward and backward", losses), ("reverse step", steps)):
        result[name] = measure(candidates, arguments.device, arguments.repeats, unit)
        show(f"{name}: {arguments.width} ids, {rows} rows", result[name], "official", "logits")
    write_json(arguments.output, result)
    print(f"\n{arguments.output}")


if __name__ == "__main__":
    main()
