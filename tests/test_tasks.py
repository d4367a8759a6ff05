"""Tasks and evaluation: what models are asked, and that answers are kept, shared out, and scored as they should be."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from miniatures import MINIATURES
from test_datasets_real import sound, text, video

from mmqlora import (
    Captioning,
    MediaError,
    Pairs,
    Recognition,
    Retrieval,
    TaskError,
    evaluate,
    predict,
    retrieval_ranks,
    write_audio,
    write_video,
)
from mmqlora.datasets.clips import Clip, Clips
from mmqlora.evaluation import score

VIDEO, SOUND = "Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2-Audio-7B-Instruct"
CHATS = [
    VIDEO,
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
    "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    SOUND,
]
CLIP, CLAP, WHISPER = "openai/clip-vit-base-patch32", "laion/clap-htsat-unfused", "openai/whisper-small.en"


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Clips]:
    """Four videos and four sounds of unequal length."""
    folder = tmp_path_factory.mktemp("clips")
    videos, sounds = [], []
    for n in range(4):
        video(folder / f"{n}.avi", 40 * n, seconds=0.4 + 0.3 * n)
        sound(folder / f"{n}.wav", 0.2 * n, seconds=0.4 + 0.3 * n)
        texts = tuple(f"caption {k} of clip {n}" for k in range(1 + n % 2))
        videos.append(Clip(f"clip{n}", folder / f"{n}.avi", texts))
        sounds.append(Clip(f"clip{n}", folder / f"{n}.wav", texts))
    return {"video": Clips(videos, "test", "any"), "audio": Clips(sounds, "test", "any")}


def of(clips: dict[str, Clips], name: str) -> Clips:
    return clips["audio" if name in (SOUND, CLAP, WHISPER) else "video"]


# Captioning


@pytest.mark.parametrize("name", CHATS)
def test_the_caption_is_what_is_learned_behind_the_very_question_that_is_asked(name, clips):
    model, processor = MINIATURES[name]()
    task = Captioning(processor, frames=4, size=(16, 16))
    clip = of(clips, name).clips[1]
    asked, example = task.ask(clip), task.encode(clip, "Two dogs.")
    length = asked["input_ids"].shape[1]
    assert torch.equal(example["input_ids"][:, :length], asked["input_ids"])
    learned = example["labels"][example["labels"] != -100]
    assert processor.tokenizer.decode(learned) == "Two dogs.<eos>"
    with torch.no_grad():
        outputs = model(**task.collate([example]))
    log_p = outputs.logits[0, -len(learned) - 1 : -1].log_softmax(-1).gather(1, learned[:, None])
    assert float(outputs.loss) == pytest.approx(-float(log_p.mean()), rel=1e-5)


@pytest.mark.parametrize("name", CHATS)
def test_answers_do_not_depend_on_who_else_is_asked(name, clips):
    model, processor = MINIATURES[name]()
    task = Captioning(processor, frames=4, size=(16, 16), max_tokens=6)
    asked = [task.ask(clip) for clip in of(clips, name).clips]
    assert task.answer(model, asked) == [task.answer(model, [one])[0] for one in asked]


def test_frames_are_told_with_their_times(clips):
    _, processor = MINIATURES["HuggingFaceTB/SmolVLM2-500M-Video-Instruct"]()
    asked = Captioning(processor, frames=2, size=(16, 16)).ask(clips["video"].clips[3])
    question = processor.tokenizer.decode(asked["input_ids"][0])
    assert "two frames from a 0:00:01" in question and question.count("Frame from 00:0") == 2


def test_selectors_choose_the_frames_that_a_model_sees(clips, tmp_path):
    frames = np.zeros((30, 16, 16, 3), np.uint8)
    frames[27:] = 255  # a scene of three frames at the end, where uniform sampling of two does not look
    write_video(tmp_path / "late.avi", frames, rate=10)
    _, processor = MINIATURES[CLIP]()
    seen = {}
    for selector in ("uniform", "segments"):
        task = Retrieval(processor, frames=2, selector=selector)
        seen[selector] = task.ask(Clip("late", tmp_path / "late.avi", ("late",)))["pixel_values"].mean((1, 2, 3))
    assert float(seen["uniform"].std()) < 0.1 < float(seen["segments"].std())
    with pytest.raises(TaskError, match="selects from whole files"):
        Retrieval(processor, frames=2, selector="segments").ask(
            Clip("late", tmp_path / "late.avi", ("late",), span=(0.0, 1.0))
        )


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda p: Captioning(p, media="audio"), "no feature_extractor"),
        (lambda p: Captioning(p, media="smell"), "expected 'video' or 'audio'"),
        (lambda p: Recognition(p), "reads with Whisper's processor"),
    ],
)
def test_a_processor_that_does_not_fit_is_refused(make, words):
    with pytest.raises(TaskError, match=words):
        make(MINIATURES[VIDEO]()[1])


# Retrieval


@pytest.mark.parametrize("name", [CLIP, CLAP])
def test_the_loss_is_the_models_own_where_a_clip_is_one_picture_or_one_sound(name, clips):
    model, processor = MINIATURES[name]()
    task = Retrieval(processor, frames=1)
    batch = task.collate([task.encode(clip, clip.texts[0]) for clip in of(clips, name).clips])
    labels = batch.pop("labels")
    with torch.no_grad():
        outputs = model(**batch, return_loss=True)
    assert float(task.loss(outputs, labels)) == pytest.approx(float(outputs.loss), rel=1e-5)


def test_a_video_is_as_similar_to_a_text_as_its_frames_are_on_average(clips):
    model, processor = MINIATURES[CLIP]()
    task = Retrieval(processor, frames=3)
    test = clips["video"]
    result = evaluate(model, task, test, progress=False)
    frames = torch.cat([task.ask(clip)["pixel_values"] for clip in test.clips])
    tokens = task._tokens(test.queries)
    with torch.no_grad():
        outputs = model(pixel_values=frames, **tokens)
        scale = model.logit_scale.exp()
    cosines = (outputs.logits_per_text / scale).view(len(test.queries), len(test), 3).mean(2)
    assert cosines.std(0).min() > 1e-4  # texts differ by more than rounding, or ranks would be noise
    ranks = retrieval_ranks(cosines.numpy(), test.answers)
    assert result.items["text_to_media_rank"] == ranks.text_to_media.tolist()
    assert result.items["media_to_text_rank"] == ranks.media_to_text.tolist()
    assert result.metrics["media_to_text_R@1"] == pytest.approx(np.mean(ranks.media_to_text == 1))
    assert "text_to_media_dual_softmax_R@1" in result.metrics


def test_a_sound_that_is_cut_at_random_is_always_cut_alike_when_asked(tmp_path):
    _, processor = MINIATURES[CLAP]()
    task = Retrieval(processor)
    write_audio(tmp_path / "long.wav", np.random.default_rng(0).normal(0, 0.1, 80_000).astype(np.float32), 8000)
    clip = Clip("long", tmp_path / "long.wav", ("noise",))
    first, second = task.ask(clip)["input_features"], task.ask(clip)["input_features"]
    assert torch.equal(first, second)
    assert not torch.equal(task.encode(clip, "noise")["input_features"], task.encode(clip, "noise")["input_features"])


# Recognition


def test_speech_longer_than_the_window_is_heard_in_parts_and_not_trained_on(tmp_path):
    model, processor = MINIATURES[WHISPER]()
    sound(tmp_path / "long.wav", 0.1, seconds=70)
    clip = Clip("long", tmp_path / "long.wav", ("HE HOPED",))
    task = Recognition(processor, max_tokens=4)
    asked = task.ask(clip)
    assert asked["input_features"].shape == (3, 16, 3000)
    sound(tmp_path / "short.wav", 0.1, seconds=1)
    other = task.ask(Clip("short", tmp_path / "short.wav", ("HE",)))
    long, short = task.answer(model, [asked, other])
    assert short == task.answer(model, [other])[0] and long == task.answer(model, [asked])[0]
    with pytest.raises(MediaError, match=r"70.0 s long, the window 30 s"):
        task.encode(clip, clip.texts[0])


def test_capitals_are_taught_in_lowercase(tmp_path):
    _, processor = MINIATURES[WHISPER]()
    sound(tmp_path / "a.wav", 0.1)
    labels = Recognition(processor).encode(Clip("a", tmp_path / "a.wav", ("x",)), "HE HOPED")["labels"]
    assert processor.tokenizer.decode(labels, skip_special_tokens=True).strip() == "he hoped"


def test_word_errors_are_counted_after_the_normalizer():
    _, processor = MINIATURES[WHISPER]()
    there = Path(__file__)
    read = [Clip("a", there, ("IT'S TWENTY FIVE POUNDS",)), Clip("b", there, ("HE HOPED",))]
    scores = Recognition(processor).score(read, ["it is £25", "he hopped"])
    assert scores.metrics["wer"] == pytest.approx(1 / 5) and scores.items["word_errors"] == [0, 1]


# Evaluation


@pytest.fixture(scope="module")
def clip_model():
    model, processor = MINIATURES[CLIP]()
    return model, Retrieval(processor, frames=2)


def test_shares_of_an_evaluation_make_the_whole(clips, clip_model, tmp_path):
    model, task = clip_model
    test = clips["video"]
    whole = evaluate(model, task, test, batch_size=3, progress=False)
    first = predict(model, task, test, tmp_path, shard=(0, 2), progress=False)
    assert len(first) == 2
    with pytest.raises(TaskError, match="2 of 4 clips have no answer"):
        score(task, test, first)
    both = predict(model, task, test, tmp_path, shard=(1, 2), batch_size=1, progress=False)
    assert score(task, test, both).items == whole.items
    assert score(task, test, both).metrics == pytest.approx(whole.metrics, abs=1e-6)


def test_a_stopped_evaluation_goes_on_where_it_was(clips, clip_model, tmp_path):
    model, task = clip_model
    test, asked = clips["video"], []

    class Dies(Retrieval):
        def answer(self, model, batch):
            if len(asked) == 3:
                raise KeyboardInterrupt
            asked.append(len(batch))
            return super().answer(model, batch)

    dies = Dies(task.processor, frames=2)
    with pytest.raises(KeyboardInterrupt):
        predict(model, dies, test, tmp_path, batch_size=1, progress=False)
    with open(tmp_path / "answers-0-of-1.jsonl", "ab") as file:
        file.write(b'{"id": "clip3", "ans')  # what a process leaves that is killed while it writes
    asked.clear()
    result = evaluate(model, dies, test, tmp_path, batch_size=1, progress=False)
    assert asked == [1]
    assert result.items == evaluate(model, task, test, progress=False).items


def test_answers_of_another_model_or_task_are_not_taken_for_its_own(clips, clip_model, tmp_path):
    model, task = clip_model
    predict(model, task, clips["video"], tmp_path, progress=False)
    with pytest.raises(TaskError, match="another model, task or data set"):
        predict(model, Retrieval(task.processor, frames=3), clips["video"], tmp_path, progress=False)
    with torch.no_grad():
        model.text_projection.weight[0, 0] += 1
    with pytest.raises(TaskError, match="another model, task or data set"):
        predict(model, task, clips["video"], tmp_path, progress=False)


def test_broken_media_is_counted_and_named(clips, clip_model, tmp_path):
    model, task = clip_model
    text(tmp_path / "broken.avi", "no video")
    broken = Clip("broken", tmp_path / "broken.avi", ("nothing",))
    test = Clips([*clips["video"].clips[:2], broken], "test", "any")
    result = evaluate(model, task, test, tmp_path / "answers", progress=False)
    assert list(result.skipped) == ["broken"] and "broken.avi" in result.skipped["broken"]
    assert len(result.answers) == 2 and len(result.items["media_to_text_rank"]) == 2
    lines = [json.loads(line) for line in (tmp_path / "answers/answers-0-of-1.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["clip0", "clip1", "broken"]
    with pytest.raises(TaskError, match="none of 1 clips could be read"):
        evaluate(model, task, Clips([broken], "test", "any"), progress=False)


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0)])
def test_a_share_that_is_none_is_refused(clips, clip_model, shard, tmp_path):
    with pytest.raises(TaskError, match="of how many"):
        predict(*clip_model, clips["video"], tmp_path, shard=shard, progress=False)


def test_shares_need_a_place_to_meet(clips, clip_model):
    with pytest.raises(TaskError, match="needs a folder"):
        predict(*clip_model, clips["video"], shard=(0, 2), progress=False)


def test_every_text_is_trained_on_with_its_clip(clips):
    _, processor = MINIATURES[CLIP]()
    task = Retrieval(processor, frames=2)
    pairs = Pairs(clips["video"], task)
    assert len(pairs) == len(clips["video"].queries)
    for index in (0, 2, len(pairs) - 1):
        expected = task.encode(clips["video"].clips[clips["video"].answers[index]], clips["video"].queries[index])
        assert all(torch.equal(pairs[index][name], value) for name, value in expected.items())
