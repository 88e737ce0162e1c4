"""The tables of README.md and of docs/ are those of the committed files, and scripts make those files."""

import importlib
import json
import re
import statistics
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
FEW_STEPS = ROOT / "benchmarks" / "few_steps.py"
SEEDS = ROOT / "shipped" / "fashion_mnist" / "training_seeds"
FIRST = "Fréchet distance to the test images"
HEADLINES = "on one CPU thread, in float32 | time | memory beyond the logits"
MODELS = ("mdlm", "xdlm-0.1", "xdlm-0.5", "udlm")


def table_of(document: str, header: str) -> list[list[str]]:
    """Cells of the rows under a header, without bold."""
    _, table = (ROOT / document).read_text().split(f"| {header} |", 1)
    rows = table.split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().replace("*", "") for cell in row.strip("|").split("|")] for row in rows]


def test_first_table_is_of_the_shipped_evaluation():
    found = json.loads((ROOT / "shipped/fashion_mnist/evaluation/fid.json").read_text())
    rows = table_of("README.md", FIRST)
    assert len(rows) == len(MODELS)
    for model, (name, *told) in zip(MODELS, rows):
        k = re.search(r"k = ([\d.]+)", name)[1]
        assert {"mdlm": "0", "udlm": "1"}.get(model, model.removeprefix("xdlm-")) == k
        for steps, text in zip(found["protocol"]["sampler"]["num_steps"], told, strict=True):
            of = [c["fid"]["pooled"] for c in found["cells"] if (c["pipeline"], c["num_steps"]) == (model, steps)]
            assert text == f"{statistics.mean(of):.2f} ± {statistics.stdev(of):.2f}", (model, steps)


def test_bits_per_token_are_of_the_shipped_evaluation():
    results = json.loads((ROOT / "shipped/fashion_mnist/evaluation/nelbo.json").read_text())["results"]
    found = {row["pipeline"]: row["bits_per_token"]["mean"] for row in results}
    told = re.search(r"3,000 test images is (.*?) for k", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert re.findall(r"\d\.\d+", told) == [f"{found[model]:.2f}" for model in MODELS]


def test_table_of_tuned_samplers_is_of_its_benchmark():
    results = json.loads((ROOT / "benchmarks/samplers.json").read_text())["results"]
    samplers = {
        "plain ancestral": "plain",
        "time grid": "grid",
        "Psi": "psi",
        "temperature": "ancestral",
        "temperature annealed": "annealed",
        "temperature annealed, time grid": "annealed-grid",
        "Psi and temperature annealed": "psi-annealed",
        "Psi, temperature annealed, time grid": "psi-annealed-grid",
        "Halton order, temperature": "halton",
        "confidence order": "confidence",
        "guidance": "guided",
        "guidance and annealing": "guided-annealed",
    }
    told = {name: cells for name, *cells in table_of("docs/few_steps.md", "Fréchet distance at 4 / 8 / 16 evaluations")}
    assert set(told) == {*samplers}
    for name, sampler in samplers.items():
        for model, text in zip(("mdlm", "xdlm-0.1", "udlm"), told[name], strict=True):
            own = {row["nfe"]: row for row in results if (row["model"], row["sampler"]) == (model, sampler)}
            means = [f"{statistics.mean(own[nfe]['fid']['pooled']):.2f}" if nfe in own else "–" for nfe in (4, 8, 16)]
            assert text == (" / ".join(means) if own else "no masks"), (name, model)


def test_table_of_the_samplers_numbers_is_of_their_trials():
    results = json.loads((ROOT / "benchmarks/samplers.json").read_text())["results"]
    found = {(row["sampler"], row["model"], row["num_steps"]): row["value"] for row in results}
    rows = [  # sampler and step count of each number of a cell
        [("ancestral", 8)],
        [("annealed", 8), ("annealed", 16)],
        [("annealed-grid", 8)],
        [("psi", 8)],
        [("psi-annealed", 8)],
        [("psi-annealed-grid", 8)],
        [("confidence", 8)],
        [("guided", 8), ("guided-annealed", 8)],
    ]
    for numbers, (name, *told) in zip(rows, table_of("docs/few_steps.md", "number that the trials chose"), strict=True):
        for model, text in zip(("mdlm", "xdlm-0.1", "udlm"), told, strict=True):
            values = [found.get((sampler, model, steps)) for sampler, steps in numbers]
            values = [f"{value:g}" if isinstance(value, float) else value for value in values]
            assert text == ("no masks" if None in values else " / ".join(values)), (name, model)
    for alike in (("ancestral", "halton"), ("annealed-grid", "grid")):  # of one row
        ours, theirs = ({m: v for (s, m, steps), v in found.items() if (s, steps) == (name, 8)} for name in alike)
        assert theirs.items() <= ours.items()


def test_table_of_chosen_samplers_is_of_its_benchmark():
    content = json.loads((ROOT / "benchmarks/samplers.json").read_text())
    header = "distance (and recall), the sampler chosen for each"
    for model, (_, *told) in zip(("mdlm", "xdlm-0.1", "udlm"), table_of("README.md", header), strict=True):
        for nfe, text in zip((4, 8, 16), told, strict=True):
            row = next(row for row in content["chosen"] if (row["model"], row["nfe"]) == (model, nfe))
            mean, spread = (of(row["fid"]["pooled"]) for of in (statistics.mean, statistics.stdev))
            assert text == f"{mean:.2f} ± {spread:.2f} ({100 * statistics.mean(row['recall']):.0f} %)", (model, nfe)


def test_comparisons_of_samplers_follow_from_their_results(monkeypatch):
    monkeypatch.syspath_prepend(FEW_STEPS.parent)
    samplers = importlib.import_module("samplers")
    content = json.loads((ROOT / "benchmarks/samplers.json").read_text())
    assert {row["sampler"] for row in content["results"]} == {*samplers.VALUES}
    assert json.loads(json.dumps(samplers.chosen(content["trials"], content["results"]))) == content["chosen"]
    for part, compare in (
        ("differences", samplers.against_baseline),
        ("against_lowest", samplers.against_lowest),
        ("against_plain", samplers.against_plain),
    ):
        for ours, theirs in zip(compare(content["results"]), content[part], strict=True):
            numbers = ("mean", "interval", "differences")
            assert {**ours, **dict.fromkeys(numbers)} == {**theirs, **dict.fromkeys(numbers)}
            for name in numbers:
                assert ours.get(name) == pytest.approx(theirs.get(name), abs=1e-12)


def test_tables_of_the_recipes_are_of_their_run():
    files = ROOT / "docs/fashion_mnist"
    cells = json.loads((files / "fid.json").read_text())["cells"]
    of = {(cell["pipeline"], cell["num_steps"]): cell for cell in cells}
    models, steps = ("mdlm", "xdlm-0.1", "udlm"), (1, 2, 4, 8, 16, 32, 64)
    for header, metric in (
        ("Fréchet distance, pooled features", "fid"),
        ("against reconstructions", "fid_against_reconstructions"),
    ):
        for model, row in zip(models, table_of("docs/fashion_mnist.md", header), strict=True):
            assert row[1:] == [f"{of[model, count][metric]['pooled']:.2f}" for count in steps]
    found = {
        row["pipeline"]: row["bits_per_token"] for row in json.loads((files / "nelbo.json").read_text())["results"]
    }
    for model, row in zip(
        models, table_of("docs/fashion_mnist.md", "NELBO of the test images, bits per token"), strict=True
    ):
        bits, right = found[model], 100 * of[model, 8]["class_accuracy"]
        assert row[2:] == [f"{bits['mean']:.2f} ± {bits['stderr']:.2f}", f"{right:.1f} %"]


def test_table_of_trainings_is_of_their_sweeps():
    rows = table_of("docs/few_steps.md", "training seed")
    assert len(rows) == 3
    for seed, row in enumerate(rows):
        cells = json.loads((SEEDS / f"seed{seed}/fid.json").read_text())["cells"]
        for model, text in zip(("mdlm", "xdlm-0.1"), row[1:], strict=True):
            of = {cell["num_steps"]: cell["fid"]["pooled"] for cell in cells if cell["pipeline"] == model}
            assert text == f"{of[4]:.2f} / {of[8]:.2f}"


def test_tables_of_tuned_samplers_over_trainings_are_of_their_results(monkeypatch):
    monkeypatch.syspath_prepend(FEW_STEPS.parent)
    over_trainings = importlib.import_module("samplers_trainings")
    tuned, content = (
        json.loads((ROOT / f"benchmarks/{name}.json").read_text()) for name in ("samplers", "samplers_trainings")
    )
    models = list(content["models"][0])
    found = {(row["model"], row["sampler"], row["nfe"]): row for row in content["results"]}
    for first in over_trainings.wanted(tuned, models):
        row = found[first["model"], first["sampler"], first["nfe"]]
        assert {layer: values[0] for layer, values in row["fid"].items()} == {
            layer: values[0] for layer, values in first["fid"].items()
        }
    again = over_trainings.compared(tuned, content["results"], models)
    assert json.loads(json.dumps(again)) == content["differences"]
    chosen = {(row["model"], row["nfe"]): row["sampler"] for row in tuned["chosen"]}
    told = table_of("docs/few_steps.md", "training seed, samplers as chosen")
    for training, (_, *cells) in enumerate(told):
        for model, text in zip(models, cells, strict=True):
            of = [found[model, chosen[model, nfe], nfe]["fid"]["pooled"][training] for nfe in (4, 8, 16)]
            assert text == " / ".join(f"{value:.2f}" for value in of)
    assert len(told) == len(content["models"]) == 3
    for training in (1, 2):  # the same networks as of the plain samples
        protocol = json.loads((SEEDS / f"seed{training}/fid.json").read_text())["protocol"]
        hashes = {name: about["weights_hash"] for name, about in protocol["pipelines"].items()}
        assert hashes == content["models"][training]


def test_table_of_the_time_input_is_of_its_sweeps():
    told = {name: cells for name, *cells in table_of("docs/few_steps.md", "distance at 4 / 8 steps")}
    files = {
        "without time": ("training_seeds/seed0/fid.json", "time_conditioning/udlm_without.json"),
        "with time": ("time_conditioning/fid.json",),
    }
    for row, names in files.items():
        content = [json.loads((ROOT / "shipped/fashion_mnist" / name).read_text()) for name in names]
        of = {(c["pipeline"], c["num_steps"]): c["fid"]["pooled"] for one in content for c in one["cells"]}
        assert told[row] == [f"{of[model, 4]:.2f} / {of[model, 8]:.2f}" for model in ("mdlm", "xdlm-0.1", "udlm")]


def test_tables_of_the_steps_bits_are_of_their_benchmark():
    content = json.loads((ROOT / "benchmarks/steps_nelbo.json").read_text())
    found = {(row["model"], row["grid"], row["num_steps"]): row for row in content["results"]}
    grids = ("linear", "cosine", "arccos", "lowest")
    costs = table_of("docs/few_steps.md", "bits per token that 2 / 4 / 8 steps cost")
    times = table_of("docs/few_steps.md", "optimal times of 4 steps")
    for model, (_, *told), (_, own) in zip(MODELS, costs, times, strict=True):
        for grid, text in zip(grids, told, strict=True):
            assert text == " / ".join(f"{found[model, grid, n]['cost']['mean']:.3f}" for n in (2, 4, 8)), (model, grid)
        assert own == ", ".join(f"{t:.3f}".rstrip("0").rstrip(".") for t in found[model, "lowest", 4]["times"])
    told = re.search(r"infinitely many steps \(([^)]*) bits", (ROOT / "docs/few_steps.md").read_text())[1]
    assert re.findall(r"[\d.]+\d", told) == [f"{content['limit'][model]['mean']:.2f}" for model in MODELS]


def test_table_of_the_lowest_grids_is_of_its_benchmark():
    own, tuned, grids = (
        json.loads((ROOT / f"benchmarks/{name}.json").read_text())
        for name in ("lowest_grid", "samplers", "steps_nelbo")
    )
    rows = {name: cells for name, *cells in table_of("docs/few_steps.md", "distance at 4 / 8 steps, plain ancestral")}
    found = {("own", row["model"], row["num_steps"]): row for row in own["results"]}
    found |= {(row["sampler"], row["model"], row["num_steps"]): row for row in tuned["results"]}
    for name, sampler in (("linear", "plain"), ("chosen by trials", "grid"), ("of the lowest NELBO", "own")):
        for model, text in zip(("mdlm", "xdlm-0.1", "udlm"), rows[name], strict=True):
            means = (statistics.mean(found[sampler, model, steps]["fid"]["pooled"]) for steps in (4, 8))
            assert text == " / ".join(f"{value:.2f}" for value in means), (name, model)
    times = {(row["model"], row["num_steps"]): row["times"] for row in grids["results"] if row["grid"] == "lowest"}
    assert all(row["times"] == times[row["model"], row["num_steps"]] for row in own["results"])
    for row in own["differences"]:
        other = found[row["minus"], row["model"], row["num_steps"]]["fid"][row["layer"]]
        of = [a - b for a, b in zip(found["own", row["model"], row["num_steps"]]["fid"][row["layer"]], other)]
        assert row["mean"] == pytest.approx(statistics.mean(of))


def test_lowest_grid_is_the_lowest_of_all(monkeypatch):
    monkeypatch.syspath_prepend(FEW_STEPS.parent)
    steps_nelbo = importlib.import_module("steps_nelbo")
    monkeypatch.setattr(steps_nelbo, "FINE", 6)
    random = np.random.default_rng(0)
    times = [i / 6 for i in range(7)]
    costs = {(t, s): float(random.random()) for t in times for s in times if t > s}
    for count in (1, 2, 3, 6):
        grids = [[1.0, *sorted(inner, reverse=True)] for inner in combinations(times[1:-1], count - 1)]
        sums = [sum(costs[step] for step in steps_nelbo.steps_of(grid)) for grid in grids]
        assert steps_nelbo.lowest_grid(costs, count) == grids[sums.index(min(sums))]


def rounded(value: float, like: str) -> str:
    """The value with as many decimals as a text."""
    return f"{value:.{len(like.partition('.')[2])}f}"


@pytest.mark.parametrize(
    ("file", "parts", "header", "names"),
    [
        (
            "loss_cpu.json",
            "widths",
            "time, V =",
            {
                "`cross_entropy`": "cross_entropy",
                "`cross_entropy`, compiled": "cross_entropy, compiled",
                "the paper's, compiled": "as the paper writes it, compiled",
                "as the paper writes it": "as the paper writes it",
                "`xdlm_nelbo`": "xdlm_nelbo",
                "... in a compiled function": "xdlm_nelbo, in a compiled function",
                "... its forward pass alone": "... its forward pass",
                "... `in_place=True`": "... in place",
                "`xdlm_nelbo`, plain torch": "xdlm_nelbo, plain torch",
                "reading the logits once": "the logits read (largest of each row)",
                "copying the logits to new memory": "the logits copied",
            },
        ),
        (
            "fused_head_cpu.json",
            "shapes",
            "time, V x D =",
            {
                "linear + `cross_entropy`": "linear + cross_entropy",
                "... compiled": "linear + cross_entropy, compiled",
                "linear + `xdlm_nelbo`": "linear + xdlm_nelbo",
                "`xdlm_head_nelbo`": "xdlm_head_nelbo",
                "... in a compiled function": "xdlm_head_nelbo, in a compiled function",
            },
        ),
        (
            "sampling_step_cpu.json",
            "widths",
            "time of a step",
            {
                "softmax + multinomial": "softmax + multinomial",
                "reverse step": "reverse step, plain torch",
                "the network of the paper's size": "bare network",
            },
        ),
        (
            "compiled_training_cpu.json",
            None,
            "options of `xdlm-image train`",
            {
                "none": "float32",
                "`--compile true`": "float32, compiled",
                "`--mixed_precision bf16`": "bfloat16",
                "both": "bfloat16, compiled",
                "both, `--attention_backend _native_math`": "bfloat16, compiled, math attention",
            },
        ),
    ],
)
def test_tables_of_times_are_of_their_benchmarks(file, parts, header, names):
    found = json.loads((ROOT / "benchmarks" / file).read_text())
    columns = [part["candidates"] for part in found[parts].values()] if parts else [found["ways"]]
    told = {name: cells for name, *cells in table_of("docs/speed.md", header)}
    assert set(told) == {*names}
    base = next(iter(names.values()))
    for name, cells in told.items():
        own = [candidates[names[name]] for candidates in columns]
        for candidates, entry, text in zip(columns, own, cells):
            assert text == rounded(entry["seconds"] / candidates[base]["seconds"], like=text), (name, text)
        for text in filter(None, cells[len(columns) :]):
            low, high = (f([entry["memory"] for entry in own]) for f in (min, max))
            ends = text.split(" to ")
            assert ends == [rounded(value, like=ends[0]) for value in (low, high)][: len(ends)], (name, text)
            assert rounded(high, like=ends[0]) == ends[-1], (name, text)


def test_table_of_processors_is_of_their_benchmarks():
    rows = table_of("docs/speed.md", "range over the widths above")
    for machine, (_, *told) in zip(("", "_avx2", "_intel"), rows, strict=True):
        values = []
        for file, parts, ours, theirs in (
            ("loss", "widths", "xdlm_nelbo", "cross_entropy"),
            ("fused_head", "shapes", "xdlm_head_nelbo", "linear + cross_entropy"),
        ):
            found = json.loads((ROOT / f"benchmarks/{file}_cpu{machine}.json").read_text())[parts].values()
            for base in (theirs, f"{theirs}, compiled"):
                ratios = [of["candidates"][ours]["seconds"] / of["candidates"][base]["seconds"] for of in found]
                values.append(f"{min(ratios):.2f} to {max(ratios):.2f}")
        assert told == values, machine


def test_what_is_told_in_short_is_of_the_benchmarks():
    def load(name):
        return json.loads((ROOT / f"benchmarks/{name}_cpu.json").read_text())

    def ratio(candidates, ours, theirs, what="seconds"):
        return f"{candidates[ours][what] / candidates[theirs][what]:.2f}"

    (wide, odd), official = (load("loss")["widths"][v]["candidates"] for v in ("16384", "16387")), load("official")
    head = load("fused_head")["shapes"]["16384x768"]["candidates"]
    step, ways = load("sampling_step")["widths"]["16384"]["candidates"], load("compiled_training")["ways"]
    losses, steps = official["loss, forward and backward"], official["reverse step"]
    told = {name: re.findall(r"\d\.\d+", " ".join(cells)) for name, *cells in table_of("docs/speed.md", HEADLINES)}
    assert [*told.values()] == [
        [ratio(wide, "xdlm_nelbo", name) for name in ("cross_entropy", "cross_entropy, compiled")]
        + [ratio(losses, "ours", "official")],
        [ratio(head, "xdlm_head_nelbo", f"linear + cross_entropy{of}") for of in ("", ", compiled")],
        [ratio(step, "reverse step, plain torch", "softmax + multinomial"), ratio(steps, "ours", "official")]
        + [f"{step['reverse step, plain torch']['memory']:.2f}"],
        [ratio(ways, "bfloat16, compiled", "float32", what) for what in ("seconds", "memory")],
    ]
    told = (ROOT / "README.md").read_text().split("faster than cross-entropy.**")[1].split("Fused")[0]
    assert re.findall(r"\d\.\d+", told) == [
        *(ratio(odd, "xdlm_nelbo", name) for name in ("cross_entropy", "cross_entropy, compiled")),
        f"{losses['official']['seconds'] / losses['cross_entropy']['seconds']:.1f}",
        ratio(steps, "ours", "official"),
    ]


def test_table_of_the_official_code_is_of_its_benchmark():
    found = json.loads((ROOT / "benchmarks/official_cpu.json").read_text())
    loss, step = found["loss, forward and backward"], found["reverse step"]
    rows = [(loss, "official"), (loss, "ours"), (step, "official"), (step, "ours")]
    for (of, name), (_, *told) in zip(rows, table_of("docs/speed.md", "at 16,387 ids"), strict=True):
        base = of.get("cross_entropy", {}).get("seconds")
        values = [of[name]["seconds"] / of["official"]["seconds"], base and of[name]["seconds"] / base]
        values.append(of[name]["memory"])
        assert told == [rounded(value, like=text) if value else "" for value, text in zip(values, told, strict=True)]


@pytest.mark.parametrize(
    ("committed", "sweeps"),
    [
        ("few_steps.json", ["evaluation"]),
        ("few_steps_trainings.json", ["training_seeds/seed0", "training_seeds/seed1", "training_seeds/seed2"]),
    ],
)
def test_comparisons_are_what_the_script_makes_of_the_sweeps(tmp_path, committed, sweeps):
    paths = [ROOT / "shipped/fashion_mnist" / sweep / "fid.json" for sweep in sweeps]
    output = tmp_path / "compared.json"
    subprocess.run([sys.executable, FEW_STEPS, *paths, "--output", output], check=True, capture_output=True)
    made, kept = json.loads(output.read_text()), json.loads((ROOT / "benchmarks" / committed).read_text())
    assert {**made, "rows": None} == {**kept, "rows": None}
    for ours, theirs in zip(made["rows"], kept["rows"], strict=True):
        numbers = ("mean", "interval", "differences")
        assert {**ours, **dict.fromkeys(numbers)} == {**theirs, **dict.fromkeys(numbers)}
        for name in numbers:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-9, abs=1e-12)


def test_what_is_told_of_block_sizes_is_of_their_benchmark():
    told = float(re.search(r"no other takes less than ([\d.]+) of the time", (ROOT / "docs/speed.md").read_text())[1])
    sizes = json.loads((ROOT / "benchmarks/block_sizes_cpu.json").read_text())["sizes"]
    assert len({size["constant"] for size in sizes}) == 3
    for size in sizes:
        module, name = size["constant"].split(".")
        room = "schedulers" if module == "row_draw" else "objective"
        assert getattr(importlib.import_module(f"xdlm_image.{room}.{module}"), name) == size["value"]
    least = [min(c["seconds"] for c in s["candidates"].values()) for s in sizes]
    own = [size["candidates"][f"{size['value']:,}"]["seconds"] for size in sizes]
    assert f"{min(a / b for a, b in zip(least, own)):.2f}" == f"{told:.2f}"
