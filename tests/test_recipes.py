"""Every recipe, from its file to the metrics, on a tiny model of its class and data in the published format."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from miniatures import MINIATURES, save
from test_datasets_real import make_audiocaps, make_clotho, make_librispeech, make_msrvtt, make_vatex, sound

from mmqlora import RecipeError, plan
from mmqlora.__main__ import main
from mmqlora.recipes import RECIPES, plan_recipe, read_recipe, run_recipe
from mmqlora.records import read_records


def make_all_audiocaps(folder: Path) -> None:
    make_audiocaps(folder)
    sound(folder / "audio/r1nicOVtvkQ_130.wav", 0.1)  # a clip of the training split
    sound(folder / "audio/UDGBjjwyaqE_20.wav", 0.2)


DATA = {
    "audiocaps": make_all_audiocaps,
    "clotho": make_clotho,
    "librispeech": make_librispeech,
    "msrvtt": make_msrvtt,
    "vatex": make_vatex,
}
SPLITS = {"librispeech": {"data.train": {"subset": "test-clean"}}}  # the miniature has this subset only
MEASURES = {"recognition": "wer", "captioning": "rouge_l", "retrieval": "text_to_media_R@1"}

pytestmark = pytest.mark.filterwarnings("ignore:.*published with", "ignore:.*are missing", "ignore:.*could not be read")


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_run_from_file_to_metrics(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = read_recipe(name)
    monkeypatch.setenv("MMQLORA_MODELS", str(tmp_path / "models"))
    save(recipe.model["name_or_path"], tmp_path / "models")
    data = recipe.data["name"]
    DATA[data](tmp_path / "data")
    small = recipe.but(
        **{
            "training.steps": 2,
            "training.batch_size": 2,
            "training.accumulate": 1,
            "training.workers": 0,
            "evaluation.workers": 0,
            **SPLITS.get(data, {}),
        }
    )
    if "frames" in recipe.task:
        small = small.but(**{"task.frames": 2, "task.size": [16, 16]})
    record = run_recipe(small, tmp_path / "data", tmp_path / "run", progress=False)
    measure = MEASURES[recipe.task["name"]]
    assert set(record["metrics"]) == set(record["before"]) and 0 <= record["metrics"][measure]
    assert len(record["losses"]) == 2 and (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    assert run_recipe(small, tmp_path / "data", tmp_path / "run")["when"] == record["when"]  # is not run again


def test_a_recipe_runs_from_a_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("MMQLORA_MODELS", str(tmp_path / "models"))
    save("openai/clip-vit-base-patch32", tmp_path / "models")
    make_msrvtt(tmp_path / "data")
    settings = [
        "training.steps=2",
        "training.workers=0",
        "evaluation.workers=0",
        "task.frames=2",
        'adapter.method="dora"',
    ]
    arguments = ["run", "clip_msrvtt", "--data", str(tmp_path / "data"), "--output", str(tmp_path / "run"), "--set"]
    assert main([*arguments, *settings]) == 0
    out = capsys.readouterr().out
    assert "text_to_media_R@1" in out and "Published: text to video R@1 43.1%" in out
    assert main([*arguments, "training.steps=3"]) == 2  # another run in the same folder
    assert "output folder of its own" in capsys.readouterr().err
    assert main([*arguments, "training.steps=many"]) == 2
    assert "no value of TOML" in capsys.readouterr().err


CLIP = RECIPES["clip_msrvtt"].read_text()


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("steps = 3000", "step = 3000", r"\[training\] has no steps"),
        ("batch_size = 32\nworkers = 8\n\n[plan]", "batchsize = 32\n[plan]", r"\[evaluation\] has \['batchsize'\]"),
        ("learning_rate", "seed", r"\[training\] has \['seed'\], which can't be set there"),
        ('name = "retrieval"', 'name = "retrieving"', "task.name is 'retrieving'; expected one of recognition"),
        ('name = "msrvtt"', 'name = "youtube"', "data.name is 'youtube'; expected one of audiocaps"),
        ("[task]", "[tasks]", r"lacks \['task'\], and nobody reads its \['tasks'\]"),
        ("split =", "subset =", r"\[data.train\] has \['subset'\].* lacks \['split'\]"),
        ("title =", "title", "expected a TOML file"),
    ],
)
def test_a_slip_in_a_recipe_is_found_before_anything_runs(tmp_path: Path, old: str, new: str, words: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(CLIP.replace(old, new))
    with pytest.raises(RecipeError, match=words):
        read_recipe(path)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_can_be_planned(name: str) -> None:
    recipe = read_recipe(name)
    config = MINIATURES[recipe.model["name_or_path"]]()[0].config
    small = recipe.but(**{"plan.pixels": 16, "plan.tokens": 8, "training.batch_size": 2})
    assert plan_recipe(small, "T4", config).fits
    assert (
        plan_recipe(small.but(**{"training.batch_size": 4}), config=config).process
        > plan_recipe(small, config=config).process
    )


def test_seconds_that_do_not_fill_the_window_take_fewer_tokens() -> None:
    config = MINIATURES["Qwen/Qwen2-Audio-7B-Instruct"]()[0].config  # a window of two seconds, 50 tokens
    assert plan(config, seconds=2, tokens=8).tokens - plan(config, seconds=1, tokens=8).tokens == 25


def test_a_recipe_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such file; expected a TOML file, or one of clap_audiocaps"):
        read_recipe(tmp_path / "none.toml")


def test_two_processes_share_the_clips_and_leave_one_record(tmp_path: Path) -> None:
    save("openai/clip-vit-base-patch32", tmp_path / "models")
    make_msrvtt(tmp_path / "data")
    command = ["-m", "mmqlora", "run", "clip_msrvtt", "--data", str(tmp_path / "data"), "--set", "training.steps=2"]
    command += ["training.workers=0", "evaluation.workers=0", "task.frames=2"]
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    environment = {**os.environ, "MMQLORA_MODELS": str(tmp_path / "models"), "OMP_NUM_THREADS": "1"}
    said = {}
    for name, more in (("one", []), ("two", launch)):
        whole = [sys.executable, *more, *command, "training.batch_size=2", "--output", str(tmp_path / name)]
        done = subprocess.run(whole, capture_output=True, text=True, env=environment, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        said[name] = done.stdout
    one, two = (read_records(tmp_path / name / "record.jsonl") for name in ("one", "two"))
    assert len(two) == 1 and two[0]["before"] == one[0]["before"] and two[0]["training"]["processes"] == 2
    assert {path.name for path in (tmp_path / "two" / "after").glob("*.jsonl")} == {
        "answers-0-of-2.jsonl",
        "answers-1-of-2.jsonl",
    }
    assert said["two"].count("could not be read") == 1
