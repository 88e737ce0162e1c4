"""README's commands for one's own images, with fewer steps, from pictures of several kinds to an FID table."""

import json
import re
import shlex
from pathlib import Path

from PIL import Image

from xdlm_image import cli

README = Path(__file__).resolve().parents[1] / "README.md"
FEWER = {  # steps, and smaller parts
    "train-tokenizer": "--max_steps 4 --warmup_steps 1 --plain_steps 2 --batch_size 8 --model.block_out_channels "
    "[16,16,16] --model.num_vq_embeddings 16",
    "encode": "",
    "train": "--max_steps 2 --warmup_steps 1 --batch_size 4 --model.num_layers 1 --model.num_attention_heads 2",
    "sample": "",
    "train-extractor": "--epochs 1 --width 8 --feature_dim 16",
    "evaluate": "--num_samples 24",
}


def commands() -> list[list[str]]:
    block = README.read_text().split("<!-- your own images -->")[1].split("```bash\n")[1].split("```")[0]
    lines = re.sub(r"\\\n\s*", "", block).strip().splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines]


def test_readmes_commands_go_from_pictures_to_a_table(tmp_path, monkeypatch):
    pictures = tmp_path / "pictures"
    for i in range(120):
        folder = pictures / ("cats", "small dogs", "owls")[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        mode = ("RGB", "L", "CMYK")[i // 3 % 3]
        Image.effect_noise((70 + i, 90), 2 * i).convert("RGB").convert(mode).save(folder / f"{i}.jpg")
    monkeypatch.chdir(tmp_path)
    called = []
    for verb, *arguments in commands():
        arguments = [argument.replace("~/pictures", str(pictures)) for argument in arguments]
        assert cli.main([verb, *arguments, *FEWER[verb].split()]) == 0, verb
        called.append(verb)
    assert called == [*FEWER]
    assert Image.open("runs/mine/grid.png").mode == "RGB"
    cells = json.loads(Path("runs/mine/evaluation/fid.json").read_text())["cells"]
    assert [cell["num_steps"] for cell in cells] == [4, 8, 16]
