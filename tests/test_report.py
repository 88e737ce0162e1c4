"""The pages of a sweep: tidy CSV, plots, and one HTML file that needs nothing beside it."""

import csv
import dataclasses
import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from xdlm_image.evaluation import plots, sweep, tables
from xdlm_image.evaluation.plan import _add_nelbo
from xdlm_image.evaluation.plots import PLOTS, write_plots
from xdlm_image.evaluation.report import protocol_text, write_html
from xdlm_image.evaluation.sweep import evaluate

pytestmark = pytest.mark.filterwarnings("ignore:.*images are few for the.*:UserWarning")


@pytest.fixture(scope="module")
def finished(parts, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "GRID_IMAGES", 1)
        output = tmp_path_factory.mktemp("report")
        recipe = parts.recipe(output, num_samples=9, temperature=[1.0, (1.0, 0.5)])
        recipe = dataclasses.replace(recipe, images={"real": f"{parts.data.root}/train"})
        return evaluate(recipe).parent


def test_csv_has_a_row_a_cell_with_its_settings_and_numbers(finished):
    content = json.loads((finished / "fid.json").read_text())
    lines = list(csv.DictReader((finished / "fid.csv").open()))
    cells = content["cells"]
    assert len(lines) == len(cells) + 1 == 2 * 2 * 2 * 2 + 1
    for line, cell in zip(lines, cells):
        assert (line["pipeline"], int(line["num_steps"]), int(line["seed"])) == tuple(
            cell[name] for name in ("pipeline", "num_steps", "seed")
        )
        temperature = "1 to 0.5" if isinstance(cell["temperature"], list) else str(cell["temperature"])
        assert line["temperature"] == temperature and line["schema_version"] == "8"
        assert float(line["fid.pooled"]) == cell["fid"]["pooled"]
        assert float(line["code_pair_total_variation.near"]) == cell["code_pair_total_variation"]["near"]
        assert int(line["nfe"]) == cell["nfe"] and float(line["images_per_second"]) > 0
    assert lines[-1]["name"] == "real" and lines[-1]["num_samples"] == "120" and lines[-1]["pipeline"] == ""


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources, self.texts, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        self.open += [] if tag in ("meta", "img") else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())


def test_the_html_page_is_whole_in_one_file(finished):
    page = Page((finished / "report.html").read_text())
    assert page.open == []
    assert len(page.sources) == 3 + 2 * 2 and all(s.startswith("data:image/png;base64,") for s in page.sources)
    row = "mdlm, temperature 1 to 0.5"
    for wanted in ("FID, features pooled, against the real images", row, "Sets of images", "real"):
        assert wanted in page.texts, wanted
    cell = re.search(r"\| xdlm-0.1, temperature 1 to 0.5 \| (\S+ ± \S+) \|", (finished / "fid.md").read_text())[1]
    assert cell in page.texts
    assert (
        json.loads(next(text for text in page.texts if text.startswith("{")))
        == json.loads((finished / "fid.json").read_text())["protocol"]
    )


def test_names_with_markup_do_not_become_markup(finished, tmp_path):
    content = json.loads((finished / "fid.json").read_text())
    content["warnings"] = ["<script>alert(1)</script>"]
    page = write_html(tmp_path, content).read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page and "<img" not in page  # no pictures lie there


def test_fid_against_nelbo(finished, tmp_path):
    content = json.loads((finished / "fid.json").read_text())
    told = content["protocol"]["pipelines"]
    measured = {
        "protocol": {"pipelines": {name: {"weights_hash": about["weights_hash"]} for name, about in told.items()}},
        "results": [
            {"pipeline": name, "bits_per_token": {"mean": 5.0 + i, "low": 4.9 + i, "high": 5.1 + i}}
            for i, name in enumerate(told)
        ],
    }
    (tmp_path / "nelbo.json").write_text(json.dumps(measured))
    _add_nelbo(str(tmp_path / "nelbo.json"), told)
    assert [about["nelbo_bits_per_token"]["mean"] for about in told.values()] == [5.0, 6.0]
    assert tmp_path / "fid_nelbo.png" in write_plots(tmp_path, content)
    measured["results"].pop()
    (tmp_path / "nelbo.json").write_text(json.dumps(measured))
    with pytest.raises(ValueError, match="holds no pipeline of the weights of xdlm-0.1"):
        _add_nelbo(str(tmp_path / "nelbo.json"), told)
    (tmp_path / "nelbo.json").write_text("{}")
    with pytest.raises(ValueError, match="no file of the verb nelbo"):
        _add_nelbo(str(tmp_path / "nelbo.json"), told)
    with pytest.raises(FileNotFoundError, match="`xdlm-image nelbo` writes it"):
        _add_nelbo(str(tmp_path / "none.json"), told)


def test_a_page_shows_nothing_of_an_earlier_sweep_in_its_folder(finished, tmp_path):
    content = json.loads((finished / "fid.json").read_text())
    for name in PLOTS:
        (tmp_path / name).write_bytes((finished / "fid.png").read_bytes())
    content["protocol"]["pipelines"].pop("mdlm")  # one k, no NELBO
    content["cells"] = [cell for cell in content["cells"] if cell["pipeline"] != "mdlm"]
    assert write_plots(tmp_path, content) == [tmp_path / "fid.png", tmp_path / "fid_time.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fid.png", "fid_time.png"]
    assert len(Page(write_html(tmp_path, content).read_text()).sources) == 2
    content["cells"], content["protocol"]["pipelines"] = [], {}
    assert write_plots(tmp_path, content) == [] and Page(write_html(tmp_path, content).read_text()).sources == []


def test_neighbours_stand_beside_their_pipeline(finished, tmp_path):
    """As docs/evaluation.md tells: `neighbours --output OUTPUT_DIR/neighbours_NAME.png`."""
    content = json.loads((finished / "fid.json").read_text())
    for name in ("neighbours_mdlm.png", "neighbours_stranger.png"):
        Image.new("L", (8, 8)).save(tmp_path / name)
    page = write_html(tmp_path, content).read_text()
    assert page.index("<h2>mdlm") < page.index('alt="neighbours_mdlm.png"') < page.index("<h2>xdlm-0.1")
    assert "stranger" not in page


def test_plots_of_nfe_time_and_k(finished):
    for name in ("fid.png", "fid_time.png", "fid_k.png"):
        with Image.open(finished / name) as picture:
            assert picture.width > 800


def test_guidance_that_is_none_first_and_in_an_interval_then(finished, tmp_path):
    content = json.loads((finished / "fid.json").read_text())
    sampler = content["protocol"]["sampler"]
    sampler["guidance_scale"], sampler["guidance_interval"] = [1.0, 2.0], [[0.1, 0.7], None]
    guided = [
        {**cell, "guidance_scale": 2.0, "guidance_interval": interval}
        for cell in content["cells"]
        for interval in ([0.1, 0.7], None)
    ]
    content["cells"] += guided
    curves = plots._curves_over(content, {"mdlm": 0.0, "xdlm-0.1": 0.1})
    assert all(len(points("pooled")) == 2 for points in curves.values())
    labels = [*tables.rows(content)]
    assert any(label.endswith("guidance 2, temperature 1, guided in t all") for label in labels)
    assert "guided in t from 0.1 to 0.7, all" in protocol_text(content)
