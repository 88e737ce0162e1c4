"""Does what few steps cost depend on the sampler? Ancestral, annealed, orders and correctors, tuned alike, per model.

    torchrun --nproc-per-node 2 benchmarks/samplers.py [--samplers guided annealed] [--num_steps 16]

Every sampler of every model but the plain one (ancestral, temperature 1) gets six trials of its one number
(temperature; for annealed, which is ancestral, what the temperature falls to from 1 as t goes to 0; for confidence the
choice temperature; for psi kappa; for psi-annealed, with kappa = 0, what annealed has; for guided, which is ancestral,
the scale; for guided-annealed, with the temperature of annealed as tuned, the scale; for grid, and for annealed-grid
and psi-annealed-grid with the tuned temperature of what they add it to, one of three time grids): on 1,000 images of a
seed of their own, against the validation images. The lowest sum of pooled FID over the step counts wins, one number for
all of them, and is measured on 5,000 images of three other seeds, against the test images; the lowest trial at an NFE
chooses a sampler for each model. A guided step evaluates the network twice: what is compared has as many evaluations
(NFE). Killed, the same command goes on; without torchrun it runs on one process. Of some samplers or step counts alone,
what the output holds of the others stays.
"""

import argparse
import json
import statistics
from pathlib import Path

from few_steps import interval

from xdlm_image import XDLMOrderedScheduler, XDLMPipeline, XDLMPsiScheduler
from xdlm_image.devices import best_device, fast_dtype
from xdlm_image.drawing.opening import open_pipeline, pipeline_hash
from xdlm_image.evaluation.sweep import evaluate
from xdlm_image.files import write_json
from xdlm_image.processes import process_state
from xdlm_image.ranks import rank_and_world
from xdlm_image.recipes import EvaluateRecipe
from xdlm_image.schedulers.scheduling_xdlm import TIME_GRIDS

ROOT = Path(__file__).resolve().parents[1]
TEMPERATURES, CHOICE_TEMPERATURES = [0.4, 0.5, 0.6, 0.7, 0.8, 1.0], [0.25, 0.5, 1.0, 2.0, 4.5, 9.0]
ENDS = [0.0, 0.1, 0.2, 0.3, 0.4, 0.6]
TRIAL = {"num_samples": 1000, "seeds": [100], "feature_metrics": [], "reference_split": "validation"}
SEEDS = [0, 1, 2]
KAPPAS = [0.0, 0.2, 0.4, 0.6, 0.8, 0.9]
SCALES = [1.25, 1.5, 2.0, 2.5, 3.0, 4.0]
VALUES = {
    "plain": [1.0],
    "ancestral": TEMPERATURES,
    "annealed": ENDS,
    "halton": TEMPERATURES,
    "confidence": CHOICE_TEMPERATURES,
    "psi": KAPPAS,
    "psi-annealed": ENDS,
    "guided": SCALES,
    "guided-annealed": SCALES,
    "grid": sorted(TIME_GRIDS),
    "annealed-grid": sorted(TIME_GRIDS),
    "psi-annealed-grid": sorted(TIME_GRIDS),
}
TEMPERATURE_OF = {  # samplers that take the temperature of another as tuned
    "guided-annealed": "annealed",
    "annealed-grid": "annealed",
    "psi-annealed-grid": "psi-annealed",
}
SAVED = {"confidence": "ct", "psi": "kappa"}  # whose number is the scheduler's own, saved with a pipeline -> its sign
VARIED = {  # the setting that trials of a sampler vary; of the others: temperature
    "guided": "guidance_scale",
    "guided-annealed": "guidance_scale",
    "grid": "time_grid",
    "annealed-grid": "time_grid",
    "psi-annealed-grid": "time_grid",
}
METRICS = ("precision", "recall", "coverage", "class_accuracy")


def saved_with(arguments: argparse.Namespace, model: str, sampler: str, value: float) -> str:
    """Folder of the model with a sampler that keeps its number in its scheduler's settings."""
    folder = arguments.folder / "pipelines" / f"{model}-{SAVED[sampler]}{value}"
    if rank_and_world()[0] == 0:
        pipe = XDLMPipeline.from_pretrained(arguments.pipelines / model)
        own = pipe.scheduler.config
        if sampler == "psi":
            pipe.scheduler = XDLMPsiScheduler.from_config(own, kappa=value)
        else:
            pipe.scheduler = XDLMOrderedScheduler.from_config(own, unmasking=sampler, choice_temperature=value)
        pipe.save_pretrained(folder)
    if (state := process_state()) is not None:
        state.wait_for_everyone()
    return str(folder)


def names_with(arguments: argparse.Namespace, sampler: str) -> list[str]:
    """The models that the sampler can draw from: orders need masks."""
    folders = {name: arguments.pipelines / name / "scheduler" for name in arguments.names}
    k = {name: json.loads((folder / "scheduler_config.json").read_text())["k"] for name, folder in folders.items()}
    return [name for name in arguments.names if sampler not in ("halton", "confidence") or k[name] < 1]


def steps_of(trial: dict) -> list[int]:
    """The step counts whose distances it summed up."""
    return sorted(map(int, trial["fid"]))


def best_of(arguments: argparse.Namespace, trials: list[dict], model: str, sampler: str) -> float:
    """The sampler's number of the lowest distances of the model, over the step counts of this command."""
    tried = [trial for trial in trials if (trial["model"], trial["sampler"]) == (model, sampler)]
    tried = [trial for trial in tried if steps_of(trial) == arguments.num_steps]
    best: float = min(tried, key=lambda trial: sum(fid["pooled"] for fid in trial["fid"].values()))["value"]
    return best


def settings_of(arguments: argparse.Namespace, trials: list[dict], model: str, sampler: str, values: list) -> dict:
    """Options of a sweep for values of what the sampler varies, after the trials of those before it."""
    if sampler in SAVED:
        return {}
    pairs = [(1.0, end) for end in values]
    if sampler == "psi-annealed":
        return {"temperature": pairs}
    if sampler == "halton":
        return {"sampler": sampler, "temperature": values}
    settings: dict = {} if sampler == "psi-annealed-grid" else {"sampler": "ancestral"}
    if sampler in TEMPERATURE_OF:
        settings["temperature"] = [(1.0, best_of(arguments, trials, model, TEMPERATURE_OF[sampler]))]
    return settings | {VARIED.get(sampler, "temperature"): pairs if sampler == "annealed" else values}


def folder_of(arguments: argparse.Namespace, model: str, sampler: str, value: float) -> str:
    """The model's pipeline, as the sampler needs it."""
    if sampler in ("psi-annealed", "psi-annealed-grid"):
        return saved_with(arguments, model, "psi", 0.0)
    if sampler in SAVED:
        return saved_with(arguments, model, sampler, value)
    return str(arguments.pipelines / model)


def output_of(arguments: argparse.Namespace, folder: str) -> Path:
    """Where the sweep over the step counts of this command goes."""
    path: Path = arguments.folder / "-".join([folder, *map(str, arguments.num_steps)])
    return path


def cells(arguments: argparse.Namespace, folder: str, pipelines: dict[str, str], **changes) -> list[dict]:
    """A sweep over the pipelines, and its results."""
    output = output_of(arguments, folder)
    usual = {
        "extractor": str(arguments.models / "extractor"),
        "num_steps": arguments.num_steps,
        "dtype": arguments.dtype,
        "compile": True,
    }
    recipe = EvaluateRecipe(output_dir=str(output), pipelines=pipelines, **{**usual, **changes})
    evaluate(recipe)
    found = json.loads((output / "fid.json").read_text())["cells"]
    wanted = len(recipe.pipelines) * len(recipe.variants) * len(recipe.num_steps) * len(recipe.seeds)
    if len(found) != wanted:
        raise RuntimeError(f"{output / 'fid.json'}: {len(found)} cells of {wanted}; is another command at work there?")
    return found


def trials_of(arguments: argparse.Namespace, trials: list[dict], model: str, sampler: str) -> list[dict]:
    """One entry for each value tried: FID by step count."""
    values = VALUES[sampler]
    named: dict[str, float | None] = {model: None}
    if sampler in SAVED:
        named = {f"{model}-{SAVED[sampler]}{value}": value for value in values}
    folders = {name: folder_of(arguments, model, sampler, value or 0.0) for name, value in named.items()}
    settings = TRIAL | settings_of(arguments, trials, model, sampler, values)
    table: dict[float, dict] = {}
    for cell in cells(arguments, f"trials/{model}-{sampler}", folders, **settings):
        value = named[cell["pipeline"]]
        if value is None:
            value = cell[VARIED.get(sampler, "temperature")]
            value = value[1] if isinstance(value, list) else value
        row: dict = {"model": model, "sampler": sampler, "value": value, "fid": {}}
        table.setdefault(value, row)["fid"][str(cell["num_steps"])] = cell["fid"]
    return list(table.values())


def measured(arguments: argparse.Namespace, trials: list[dict], model: str, sampler: str) -> list[dict]:
    """Results of a model with a sampler as its trials tuned it, an entry a step count; numbers by seed."""
    value = best_of(arguments, trials, model, sampler)
    reference = str(arguments.models / "reference")
    final = {"num_samples": 5000, "seeds": SEEDS, "classifier": arguments.classifier, "reference": reference}
    name = f"{model}-{sampler}" if sampler in SAVED else model
    folder = folder_of(arguments, model, sampler, value)
    settings = settings_of(arguments, trials, model, sampler, [value])
    found = cells(arguments, f"final/{model}-{sampler}", {name: folder}, **final, **settings)
    rows = []
    for steps in arguments.num_steps:
        own = [cell for cell in found if cell["num_steps"] == steps]
        row = {"model": model, "sampler": sampler, "value": value, "num_steps": steps, "nfe": own[0]["nfe"]}
        row["seeds"] = SEEDS
        row["fid"] = {layer: [cell["fid"][layer] for cell in own] for layer in own[0]["fid"]}
        rows.append(row | {metric: [cell[metric] for cell in own] for metric in METRICS})
    return rows


def against_lowest(results: list[dict]) -> list[dict]:
    """Every model and sampler against the one of the lowest mean distance at its NFE, paired by seed."""
    rows = []
    for nfe in sorted({row["nfe"] for row in results}):
        here = [row for row in results if row["nfe"] == nfe]
        for layer in here[0]["fid"]:
            lowest = min(here, key=lambda row: statistics.mean(row["fid"][layer]))
            name = f"{lowest['model']} {lowest['sampler']}"
            rows += [compared(row, lowest, layer) | {"lowest": name} for row in here]
    return rows


def against_plain(results: list[dict]) -> list[dict]:
    """Every sampler of a model against the plain one with as many evaluations, paired by seed."""
    plain = {(row["model"], row["nfe"]): row for row in results if row["sampler"] == "plain"}
    found = [(row, plain.get((row["model"], row["nfe"]))) for row in results if row["sampler"] != "plain"]
    return [compared(row, base, layer) for row, base in found if base is not None for layer in row["fid"]]


def chosen(trials: list[dict], results: list[dict]) -> list[dict]:
    """The sampler of the lowest distance in its trial, for each model and NFE; and every model against the first with
    what was chosen for each, paired by seed."""
    rows: list[dict] = []
    for nfe in sorted({row["nfe"] for row in results}):
        for model in dict.fromkeys(row["model"] for row in results):
            here = [row for row in results if (row["model"], row["nfe"]) == (model, nfe)]
            if not here:
                continue
            best = min(here, key=lambda row: trial_of(trials, row)["pooled"])
            entry = {name: best[name] for name in ("model", "nfe", "sampler", "value", "num_steps", "fid", "recall")}
            base = next((row for row in rows if row["nfe"] == nfe), entry)
            of = [a - b for a, b in zip(entry["fid"]["pooled"], base["fid"]["pooled"])]
            rows.append(
                entry | {"trial": trial_of(trials, best)["pooled"], "differences": of, "interval": interval(of)}
            )
    return rows


def trial_of(trials: list[dict], row: dict) -> dict:
    """FID by layer of the trial that chose the row's value, at its step count."""
    name, steps = tuple(row[key] for key in ("model", "sampler", "value")), str(row["num_steps"])
    own = [trial["fid"] for trial in trials if (trial["model"], trial["sampler"], trial["value"]) == name]
    found: dict = next(fid[steps] for fid in own if steps in fid)
    return found


def compared(row: dict, base: dict, layer: str) -> dict:
    values = [a - b for a, b in zip(row["fid"][layer], base["fid"][layer])]
    names = {name: row[name] for name in ("model", "sampler", "nfe")} | {"layer": layer}
    return names | {"mean": statistics.mean(values), "interval": interval(values)}


def against_baseline(results: list[dict]) -> list[dict]:
    """Every model against the first with the same sampler and step count, paired by seed."""
    rows = []
    for row in results:
        same = (row["sampler"], row["num_steps"])
        base = next(other for other in results if (other["sampler"], other["num_steps"]) == same)
        if row is base:
            continue
        for layer, values in row["fid"].items():
            of = [a - b for a, b in zip(values, base["fid"][layer])]
            names = {"sampler": row["sampler"], "model": row["model"], "num_steps": row["num_steps"], "layer": layer}
            rows.append(names | {"mean": statistics.mean(of), "differences": of, "interval": interval(of)})
    return rows


def shared_protocol(arguments: argparse.Namespace, sampler: str) -> dict:
    """What all sweeps of results have in common, from those of one sampler."""
    folders = {name: output_of(arguments, f"final/{name}-{sampler}") for name in names_with(arguments, sampler)}
    protocols = {name: json.loads((folder / "fid.json").read_text())["protocol"] for name, folder in folders.items()}
    first = protocols[arguments.names[0]]
    shared = {name: value for name, value in first.items() if name not in ("pipelines", "sampler")}
    return shared | {"trials": TRIAL, "dtype": first["sampler"]["dtype"]}


def hashes_of(arguments: argparse.Namespace) -> dict[str, str]:
    """Of each model, as a sweep's protocol says them."""
    folders = {name: arguments.pipelines / name for name in arguments.names}
    return {name: pipeline_hash(open_pipeline(folder, best_device("cpu"))) for name, folder in folders.items()}


def refuse_otherwise(arguments: argparse.Namespace, kept: dict, protocol: dict, models: dict[str, str]) -> None:
    """What is kept must have been measured alike, and of the same models."""
    for part, values in (("protocol", protocol), ("models", models)):
        other = [name for name, value in values.items() if kept[part].get(name) != value]
        if other:
            raise SystemExit(f"{arguments.output}: its {part} has another {', '.join(other)}; name another --output")


def kept_of_others(arguments: argparse.Namespace) -> dict:
    """What the output holds of the samplers and step counts that are not measured now."""
    if not arguments.output.is_file():
        return {"trials": [], "results": []}
    content: dict = json.loads(arguments.output.read_text())
    samplers, steps = arguments.samplers, arguments.num_steps
    content["trials"] = [r for r in content["trials"] if r["sampler"] not in samplers or steps_of(r) != steps]
    content["results"] = [r for r in content["results"] if r["sampler"] not in samplers or r["num_steps"] not in steps]
    return content


def in_order(rows: list[dict], names: list[str]) -> list[dict]:
    """Rows by sampler, then by model, then by step count."""
    steps = [row.get("num_steps") or min(steps_of(row)) for row in rows]
    places = [([*VALUES].index(row["sampler"]), names.index(row["model"]), of) for row, of in zip(rows, steps)]
    return [row for _, row in sorted(zip(places, rows), key=lambda pair: pair[0])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=ROOT / "shipped" / "fashion_mnist", help="as shipped/train.sh's")
    names = ["mdlm", "xdlm-0.1", "udlm"]
    parser.add_argument("--names", nargs="+", default=names, help="models, the baseline first; orders need k < 1")
    parser.add_argument("--samplers", nargs="+", choices=[*VALUES], default=[*VALUES], help="default: all of them")
    parser.add_argument("--num_steps", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the network; default: the faster one here")
    parser.add_argument("--classifier", help="judges classes; default: the extractor")
    parser.add_argument("--folder", type=Path, default=Path("runs/samplers"), help="images and partial results")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    arguments.pipelines = arguments.models / "pipelines"
    if not (arguments.models / "reference").is_dir():
        parser.error(f"--models {arguments.models}: no reference folder there; shipped/train.sh makes one")
    for name in arguments.names:
        if not (arguments.pipelines / name).is_dir():
            parser.error(f"--names {name}: no such folder in {arguments.pipelines}")
    if arguments.names[0] not in names_with(arguments, "halton"):
        parser.error(f"--names {arguments.names[0]}: the baseline comes first and needs masks, k < 1")
    arguments.dtype = arguments.dtype or fast_dtype(best_device())
    arguments.num_steps = sorted(set(arguments.num_steps))
    kept = kept_of_others(arguments)
    for trial in kept["trials"]:
        if trial["sampler"] in arguments.samplers and {*steps_of(trial)} & {*arguments.num_steps}:
            parser.error(
                f"--num_steps {arguments.num_steps}: {arguments.output} has {trial['sampler']} tuned over "
                f"{steps_of(trial)} together; name those, or another --output"
            )
    if not {row["model"] for row in kept["results"]} <= set(arguments.names):
        parser.error(f"--output {arguments.output}: it holds models beside --names; name all of them, or another file")
    trials, results = kept["trials"], kept["results"]
    tuned = {(row["model"], row["sampler"]) for row in trials if steps_of(row) == arguments.num_steps}
    for sampler, other in TEMPERATURE_OF.items():
        missing = [name for name in arguments.names if (name, other) not in tuned and other not in arguments.samplers]
        if sampler in arguments.samplers and missing:
            parser.error(f"--samplers {sampler}: takes the temperature of {other}, which {missing[0]} lacks; name both")
    models = hashes_of(arguments)
    if results:
        refuse_otherwise(arguments, kept, {"dtype": arguments.dtype}, models)
    for sampler in [sampler for sampler in VALUES if sampler in arguments.samplers]:
        for model in names_with(arguments, sampler):
            trials += trials_of(arguments, trials, model, sampler)
            results += measured(arguments, trials, model, sampler)
        protocol = shared_protocol(arguments, sampler)
        if kept["results"]:
            refuse_otherwise(arguments, kept, protocol, models)
    trials, results = in_order(trials, arguments.names), in_order(results, arguments.names)
    if rank_and_world()[0] == 0:
        content = {
            "protocol": protocol,
            "models": models,
            "trials": trials,
            "results": results,
            "differences": against_baseline(results),
            "against_lowest": against_lowest(results),
            "against_plain": against_plain(results),
            "chosen": chosen(trials, results),
        }
        write_json(arguments.output, content)
        show(content, arguments.names[0])
        print(arguments.output)


def show(content: dict, baseline: str) -> None:
    for row in content["results"]:
        fids = "  ".join(f"{k} {statistics.mean(v):.2f} ± {statistics.stdev(v):.2f}" for k, v in row["fid"].items())
        others = "  ".join(f"{metric} {statistics.mean(row[metric]):.3f}" for metric in METRICS)
        place = f"{row['model']:9} {row['sampler']:15} {row['value']:4} {row['num_steps']:3} steps {row['nfe']:3} NFE"
        print(f"{place}  {fids}  {others}")
    for row in content["differences"]:
        low, high = row["interval"]
        place = f"{row['sampler']:15} {row['num_steps']} steps {row['layer']:8}"
        print(f"{place} {row['model']} - {baseline} {row['mean']:+.3f} [{low:+.3f}, {high:+.3f}]")
    for row in content["chosen"]:
        low, high = row["interval"]
        place = f"{row['nfe']:3} NFE {row['model']:9} {row['sampler']:15} {row['value']:4}"
        mean, spread = statistics.mean(row["fid"]["pooled"]), statistics.stdev(row["fid"]["pooled"])
        print(f"{place} {mean:.2f} ± {spread:.2f}, minus {baseline}'s [{low:+.3f}, {high:+.3f}]")
    for row in content["against_lowest"] + content["against_plain"]:
        low, high = row["interval"]
        place = f"{row['model']:9} {row['sampler']:15} {row['nfe']:3} NFE {row['layer']:8}"
        print(f"{place} - {row.get('lowest', 'plain')} {row['mean']:+.3f} [{low:+.3f}, {high:+.3f}]")


if __name__ == "__main__":
    main()
