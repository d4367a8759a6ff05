"""Readers of real data sets, on miniature folders in the published formats and on copies with every file broken."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from mmqlora import MediaError, SkipBroken, english_normalizer, word_error_rate, write_audio, write_video
from mmqlora.datasets.audiocaps import AudioCaps
from mmqlora.datasets.clips import Clip, Clips
from mmqlora.datasets.clotho import Clotho
from mmqlora.datasets.librispeech import LibriSpeech
from mmqlora.datasets.msrvtt import MSRVTT
from mmqlora.datasets.msvd import MSVD
from mmqlora.datasets.vatex import VATEX

RATE = 8000

pytestmark = pytest.mark.filterwarnings("ignore:.*published with", "ignore:.*could not be read")


def video(path: Path, shade: int, seconds: float = 0.4) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = np.full((round(seconds * 10), 16, 16, 3), shade, np.uint8)
    write_video(path.with_suffix(".avi"), frames, rate=10)
    os.replace(path.with_suffix(".avi"), path)  # what a file is inside counts for the decoder, not its name


def sound(path: Path, level: float, seconds: float = 0.5) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_audio(path, np.full(round(seconds * RATE), level, np.float32), RATE)


def text(path: Path, content: str, encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode(encoding))


def ids(clips: Clips) -> list[str]:
    return [clip.id for clip in clips]


def shade(clip: Clip) -> int:
    return int(clip.video(frames=1).frames[0, 0, 0, 0])


def level(clip: Clip) -> float:
    return round(float(clip.audio(rate=None).samples[0]), 1)


# The miniature folders


def make_msrvtt(folder: Path) -> MSRVTT:
    splits = ["train", "train", "validate", "test", "test", "test"]
    names = ["video0", "video1", "video6513", "video7010", "video7020", "video9770"]
    videos = [
        {"category": 9, "url": "https://www.youtube.com/watch?v=9lZi22qLlEo", "video_id": name, "id": n}
        | {"start time": 137.72, "end time": 149.44, "split": split}
        for n, (name, split) in enumerate(zip(names, splits, strict=True))
    ]
    sentences = [
        {"caption": f"caption {k} of {name}", "video_id": name, "sen_id": 2 * n + k}
        for k in range(2)  # a video's captions don't lie together in the file
        for n, name in enumerate(names)
    ]
    data = {"info": {"year": "2016"}, "videos": videos, "sentences": sentences}
    text(folder / "msrvtt_data/MSRVTT_data.json", json.dumps(data))
    text(folder / "msrvtt_data/MSRVTT_train.9k.csv", "video_id\nvideo0\nvideo1\nvideo6513\nvideo7010\n")
    text(folder / "msrvtt_data/MSRVTT_train.7k.csv", "video_id\nvideo0\nvideo1\nvideo6513\n")
    text(
        folder / "msrvtt_data/MSRVTT_JSFUSION_test.csv",
        "key,vid_key,video_id,sentence\n"
        "ret0,msr9770,video9770,a person is connecting something to system\n"
        "ret1,msr7020,video7020,a woman creating a fondant baby and flower\n",
    )
    for n, name in enumerate(names):
        video(folder / f"videos/all/{name}.mp4", 10 * n)
    return MSRVTT(folder, "1k-A")


VATEX_IDS = ["Ptf_2VRj-V0_000000_000010", "-_abcdefghi_000122_000132", "5-xGskbsBgI_000055_000065"]


def make_vatex(folder: Path) -> VATEX:
    rows = [
        {"videoID": id, "enCap": [f"English {n} {k}." for k in range(3)], "chCap": [f"中文 {n}。"]}
        for n, id in enumerate(VATEX_IDS)
    ]
    text(folder / "vatex_training_v1.0.json", json.dumps(rows[:1]))
    text(folder / "vatex_validation_v1.0.json", json.dumps(rows, ensure_ascii=False))
    text(folder / "vatex_public_test_english_v1.1.json", json.dumps([{k: rows[2][k] for k in ("videoID", "enCap")}]))
    for n, id in enumerate(VATEX_IDS):
        video(folder / f"clips/{id}.mp4", 10 * n)
    return VATEX(folder, "validation")


def make_msvd(folder: Path) -> MSVD:
    names = ["-4wsuPCjDBc_5_15", "zzit5b_-ukg_5_20", "mv89psg6zh4_33_46"]
    lines = [f"{name} caption {k} of {n}" for n, name in enumerate(names) for k in range(2 + n)]
    head = "# The Microsoft Research Video Description Corpus\n#\n# Cite Chen and Dolan (2011).\n\n"
    text(folder / "AllVideoDescriptions.txt", head + "\n".join(lines) + "\n")
    text(folder / "train_list.txt", f"{names[0]}\n")
    text(folder / "val_list.txt", f"{names[1]}\n")
    text(folder / "test_list.txt", f"{names[2]}\n{names[1]}")  # no line break at the end
    for n, name in enumerate(names):
        video(folder / f"YouTubeClips/{name}.avi", 10 * n)
    return MSVD(folder, "test")


def make_audiocaps(folder: Path) -> AudioCaps:
    head = "audiocap_id,youtube_id,start_time,caption\r\n"  # v1 has DOS line breaks
    text(
        folder / "dataset/train.csv",
        head + '91139,r1nicOVtvkQ,130,"A woman talks nearby, as water pours"\r\n58146,UDGBjjwyaqE,20,Clanking\r\n',
    )
    rows = [f"{97151 + 5 * k + n},{id},{start},caption {k} of {n}" for k in range(5) for n, (id, start) in enumerate(
        [("vfY_TJq7n_U", 130), ("tdWhHV3X25Q", 60), ("-EQByFLFqig", 21)]
    )]  # fmt: skip
    text(folder / "dataset/test.csv", head + "".join(f"{row}\r\n" for row in rows))
    sound(folder / "audio/vfY_TJq7n_U_130.wav", 0.1)
    sound(folder / "audio/YtdWhHV3X25Q.flac", 0.2)
    sound(folder / "audio/97158.wav", 0.3)  # a caption's number names the sound
    return AudioCaps(folder, "test")


CLOTHO = ["Distorted AM Radio noise.wav", "Cuatro caños, fuente.wav", "Santa Motor.wav"]


def make_clotho(folder: Path) -> Clotho:
    rows = ["file_name,caption_1,caption_2,caption_3,caption_4,caption_5"]
    for n, name in enumerate(CLOTHO):
        captions = ",".join(f'"Sound {n}, as told by {k}"' for k in range(1, 6))
        rows.append(f'"{name}",{captions}')
        for split in ("development", "evaluation"):
            sound(folder / f"clotho_audio_files/{split}/{name}", 0.1 * (n + 1 + 3 * (split == "evaluation")))
    text(folder / "clotho_csv_files/clotho_captions_development.csv", "\r\n".join(rows) + "\r\n")
    text(folder / "clotho_csv_files/clotho_captions_evaluation.csv", "\r\n".join(rows[:2]) + "\r\n")
    known = "file_name,keywords,sound_id,sound_link,start_end_samples,manufacturer,license\r\n"
    for n, name in enumerate(CLOTHO):
        known += (
            f'"{name}",fountain;agua,{n},Not found,"[0, 4000]",Peña,http://creativecommons.org/licenses/by/3.0/\r\n'
        )
    text(folder / "clotho_csv_files/clotho_metadata_development.csv", known, "iso-8859-1")
    return Clotho(folder, "development")


def make_librispeech(folder: Path) -> LibriSpeech:
    root = folder / "LibriSpeech/test-clean"
    for n, (speaker, chapter) in enumerate([(1089, 134686), (121, 121726)]):
        lines = ["HE HOPED THERE WOULD BE STEW FOR DINNER", "IT'S TWENTY FIVE POUNDS"]
        names = [f"{speaker}-{chapter}-{k:04}" for k in range(2)]
        place = root / f"{speaker}/{chapter}"
        text(place / f"{speaker}-{chapter}.trans.txt", "".join(f"{a} {b}\n" for a, b in zip(names, lines, strict=True)))
        for k, name in enumerate(names):
            sound(place / f"{name}.flac", 0.1 * (1 + 2 * n + k))
    text(folder / "LibriSpeech/SPEAKERS.TXT", ";ID  |SEX| SUBSET |MINUTES| NAME\n")
    return LibriSpeech(folder, "test-clean")


def make_msrvtt_train(folder: Path) -> MSRVTT:
    make_msrvtt(folder)
    return MSRVTT(folder, "train-9k")


MAKERS = [make_msrvtt, make_msrvtt_train, make_vatex, make_msvd, make_audiocaps, make_clotho, make_librispeech]


# What each reader gives


def test_msrvtt_1k_a_has_the_one_published_caption_of_each_video(tmp_path: Path) -> None:
    test = make_msrvtt(tmp_path)
    assert ids(test) == ["video9770", "video7020"]
    assert test.queries == ["a person is connecting something to system", "a woman creating a fondant baby and flower"]
    assert test.answers.tolist() == [0, 1] and "one caption" in test.protocol and test.published == 1000
    assert [shade(clip) for clip in test] == [50, 40] and test[0].span is None
    assert repr(test) == "MSRVTT('1k-A', 2 clips, 2 texts; published: 1000)"
    with pytest.warns(UserWarning, match=r"MSRVTT\('1k-A'\): 2 clips listed, published with 1000; is the list whole\?"):
        MSRVTT(tmp_path, "1k-A")


def test_msrvtt_splits_are_those_of_their_lists(tmp_path: Path) -> None:
    make_msrvtt(tmp_path)
    seven = ["video0", "video1", "video6513"]
    assert ids(MSRVTT(tmp_path, "train-7k")) == seven
    assert ids(MSRVTT(tmp_path, "train-9k")) == [*seven, "video7010"]
    assert [ids(MSRVTT(tmp_path, split)) for split in ("train", "validate")] == [seven[:2], seven[2:]]
    full = MSRVTT(tmp_path, "test")
    assert ids(full) == ["video7010", "video7020", "video9770"] and "every caption" in full.protocol
    assert full[1].texts == ("caption 0 of video7020", "caption 1 of video7020")
    assert full.answers.tolist() == [0, 0, 1, 1, 2, 2] and full.queries[2:4] == list(full[1].texts)
    # The files are cut: the span on YouTube is known, and not read.
    assert full[0].known["start time"] == 137.72 and len(full[0].video()) == 4


def test_msrvtt_reads_the_files_of_microsoft_as_well(tmp_path: Path) -> None:
    make_msrvtt(tmp_path)
    both = MSRVTT(tmp_path, "train-9k")
    whole = tmp_path / "msrvtt_data/MSRVTT_data.json"
    data = json.loads(whole.read_text())
    for name, splits in (
        ("train_val_videodatainfo.json", {"train", "validate"}),
        ("test_videodatainfo.json", {"test"}),
    ):
        videos = [row for row in data["videos"] if row["split"] in splits]
        kept = {row["video_id"] for row in videos}
        sentences = [row for row in data["sentences"] if row["video_id"] in kept]
        text(tmp_path / name, json.dumps({"videos": videos, "sentences": sentences}))
    whole.unlink()
    assert [clip.texts for clip in MSRVTT(tmp_path, "train-9k")] == [clip.texts for clip in both]
    assert ids(MSRVTT(tmp_path, "test")) == ["video7010", "video7020", "video9770"]


def test_msrvtt_names_videos_of_a_list_that_are_in_no_annotation(tmp_path: Path) -> None:
    make_msrvtt(tmp_path)
    with open(tmp_path / "msrvtt_data/MSRVTT_train.9k.csv", "a") as file:
        file.write("video10000\n")
    with pytest.raises(MediaError, match=r"9k\.csv: 1 videos are in no annotation, such as \['video10000'\]"):
        MSRVTT(tmp_path, "train-9k")


def test_vatex_has_english_captions_and_clips_by_id(tmp_path: Path) -> None:
    clips = make_vatex(tmp_path)
    assert ids(clips) == VATEX_IDS and [shade(clip) for clip in clips] == [0, 10, 20]
    assert clips[1].texts == ("English 1 0.", "English 1 1.", "English 1 2.")
    assert clips.answers.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and clips.published == 3000
    assert ids(VATEX(tmp_path, "train")) == VATEX_IDS[:1] and ids(VATEX(tmp_path, "test")) == VATEX_IDS[2:]


def test_vatex_retrieval_takes_the_published_list_of_a_half(tmp_path: Path) -> None:
    make_vatex(tmp_path)
    text(tmp_path / "tst_names.txt", "\r\n".join(reversed(VATEX_IDS[1:])))
    half = VATEX(tmp_path, "validation", ids=tmp_path / "tst_names.txt")
    assert ids(half) == VATEX_IDS[:0:-1] == ids(VATEX(tmp_path, "validation", ids=np.array(VATEX_IDS[:0:-1])))
    assert repr(half) == "VATEX('validation, 2 ids', 2 clips, 6 texts)"
    for wrong in (["video7"], VATEX_IDS[:1] * 2, []):
        with pytest.raises(MediaError, match=r"Expected ids such as Ptf_2VRj-V0_000000_000010, each once"):
            VATEX(tmp_path, "validation", ids=wrong)


def test_vatex_reads_the_span_of_whole_videos(tmp_path: Path) -> None:
    make_vatex(tmp_path)
    frames = np.repeat(np.arange(140, dtype=np.uint8), 16 * 16 * 3).reshape(140, 16, 16, 3)
    (tmp_path / "youtube").mkdir()
    for id in VATEX_IDS:
        write_video(tmp_path / f"youtube/{id[:11]}.avi", frames, rate=1)  # a frame's shade is its second
    clips = VATEX(tmp_path, "validation", media=tmp_path / "youtube", cut=False)
    assert [clip.span for clip in clips] == [(0, 10), (122, 132), (55, 65)]
    assert clips[1].video().frames[:, 0, 0, 0].tolist() == list(range(122, 132))
    assert clips[2].video(frames=2).times.tolist() == [57, 62]


def test_vatex_counts_and_names_clips_that_are_gone(tmp_path: Path) -> None:
    make_vatex(tmp_path)
    (tmp_path / f"clips/{VATEX_IDS[0]}.mp4").unlink()
    (tmp_path / f"clips/{VATEX_IDS[2]}.mp4").write_bytes(b"")  # as a failed download leaves it
    with pytest.warns(UserWarning, match=r"VATEX\('validation'\): 2 of 3 clips are missing: .*V0_000000_000010"):
        clips = VATEX(tmp_path, "validation")
    assert ids(clips) == VATEX_IDS[1:2] and list(clips.missing) == [VATEX_IDS[0], VATEX_IDS[2]]
    assert "empty" in clips.missing[VATEX_IDS[2]]
    assert repr(clips) == "VATEX('validation', 1 clip, 3 texts, 2 missing; published: 3000)"
    assert clips.answers.tolist() == [0, 0, 0]


def test_msvd_has_all_captions_in_the_order_of_its_lists(tmp_path: Path) -> None:
    test = make_msvd(tmp_path)
    assert ids(test) == ["mv89psg6zh4_33_46", "zzit5b_-ukg_5_20"] and [shade(clip) for clip in test] == [20, 10]
    assert test.answers.tolist() == [0] * 4 + [1] * 3 and test[1].texts[2] == "caption 2 of 1"
    assert [len(MSVD(tmp_path, split)) for split in ("train", "val")] == [1, 1]


def test_msvd_counts_lines_without_a_caption_and_refuses_others(tmp_path: Path) -> None:
    make_msvd(tmp_path)
    path = tmp_path / "AllVideoDescriptions.txt"
    lines = path.read_text()
    path.write_text(lines + "mv89psg6zh4_33_46\nmv89psg6zh4_33_46  \n")
    with pytest.warns(UserWarning, match=r"2 texts without a word left out"):
        test = MSVD(tmp_path, "test")
    assert len(test[0].texts) == 4 and test.blank == 2
    path.write_text(lines + "someone slices a potato\n")
    with pytest.raises(
        MediaError, match=r"AllVideoDescriptions\.txt, line 14: 'someone slices a potato'; expected an id"
    ):
        MSVD(tmp_path, "test")


def test_audiocaps_joins_five_captions_and_finds_the_names_of_downloaders(tmp_path: Path) -> None:
    test = make_audiocaps(tmp_path)
    assert ids(test) == ["vfY_TJq7n_U_130", "tdWhHV3X25Q_60", "-EQByFLFqig_21"]
    assert [level(clip) for clip in test] == [0.1, 0.2, 0.3] and test[0].span is None
    assert test[2].texts == tuple(f"caption {k} of 2" for k in range(5))
    assert test[0].known["audiocap_ids"] == ["97151", "97156", "97161", "97166", "97171"]
    assert test.published == 975 and repr(test).startswith("AudioCaps('v1 test', 3 clips, 15 texts")
    sound(tmp_path / "audio/r1nicOVtvkQ.wav", 0.4)
    with pytest.warns(UserWarning, match=r"1 of 2 clips are missing: .*UDGBjjwyaqE_20"):
        train = AudioCaps(tmp_path, "train", version="v2")
    assert train[0].texts == ("A woman talks nearby, as water pours",) and train.split == "v2 train"


def test_audiocaps_reads_the_span_of_whole_sounds(tmp_path: Path) -> None:
    make_audiocaps(tmp_path)
    samples = np.repeat(np.arange(145, dtype=np.float32) / 1000, 100)  # a sample's level is its second
    for name in ("vfY_TJq7n_U", "tdWhHV3X25Q", "Y-EQByFLFqig"):
        (tmp_path / "youtube").mkdir(exist_ok=True)
        write_audio(tmp_path / f"youtube/{name}.wav", samples, 100)
    test = AudioCaps(tmp_path / "dataset", "test", media=tmp_path / "youtube", cut=False)
    audio = test[0].audio(rate=None)
    assert audio.start == 130 and audio.duration == 10
    np.testing.assert_allclose(audio.samples[[0, -1]], [0.130, 0.139])
    assert test[2].span == (21, 31)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("97151,aaaaaaaaaaa,0,again", "audiocap_id 97151 occurs more than once"),
        ("1,aaaaaaaaaaa,1:30,late", "'1:30'; expected whole seconds"),
        ("1,aaaaaaaaaaa,10,one, two", r"line 17: 5 fields; expected 4.*quotes"),
        ("1,aaaaaaaaaaa,10", "line 17: 3 fields; expected 4"),
        ('1,aaaaaaaaaaa,10,"open', r"from line 17 on: no CSV"),
    ],
)
def test_audiocaps_names_a_malformed_row(tmp_path: Path, row: str, message: str) -> None:
    make_audiocaps(tmp_path)
    with open(tmp_path / "dataset/test.csv", "a", newline="") as file:
        file.write(row + "\r\n")
    with pytest.raises(MediaError, match=rf"test\.csv.*{message}"):
        AudioCaps(tmp_path, "test")


def test_clotho_reads_utf_8_captions_and_iso_8859_1_metadata(tmp_path: Path) -> None:
    sounds = make_clotho(tmp_path)
    assert ids(sounds) == CLOTHO and [level(clip) for clip in sounds] == [0.1, 0.2, 0.3]
    assert sounds[1].texts == tuple(f"Sound 1, as told by {k}" for k in range(1, 6))
    assert sounds[1].known["manufacturer"] == "Peña" and sounds[1].known["keywords"].split(";") == ["fountain", "agua"]
    assert sounds.answers.tolist() == [0] * 5 + [1] * 5 + [2] * 5 and sounds.published == 3839
    # The same name in two splits is two sounds; metadata may be absent.
    other = Clotho(tmp_path, "evaluation")
    assert ids(other) == CLOTHO[:1] and level(other[0]) == 0.4 and other[0].known == {}
    assert level(Clotho(tmp_path, "evaluation", media=tmp_path / "clotho_audio_files/development")[0]) == 0.1


def test_clotho_names_the_line_of_captions_in_another_encoding(tmp_path: Path) -> None:
    make_clotho(tmp_path)
    path = tmp_path / "clotho_csv_files/clotho_captions_development.csv"
    path.write_bytes(path.read_text(encoding="utf-8").encode("iso-8859-1"))
    with pytest.raises(MediaError, match=r"clotho_captions_development\.csv, line 3: not UTF-8 \(b'\\xf1'\)"):
        Clotho(tmp_path, "development")


def test_clotho_says_when_the_folder_of_sounds_is_not_clear(tmp_path: Path) -> None:
    make_clotho(tmp_path)
    (tmp_path / "features/development").mkdir(parents=True)
    with pytest.raises(MediaError, match=r"2 folders named 'development'.*give it as media"):
        Clotho(tmp_path, "development")
    with pytest.raises(MediaError, match=r"no clotho_captions_validation\.csv"):
        Clotho(tmp_path, "validation")


def test_librispeech_gives_transcripts_as_published_and_the_normalizer_makes_them_comparable(tmp_path: Path) -> None:
    speech = make_librispeech(tmp_path)
    assert ids(speech) == ["1089-134686-0000", "1089-134686-0001", "121-121726-0000", "121-121726-0001"]
    assert speech.queries[:2] == ["HE HOPED THERE WOULD BE STEW FOR DINNER", "IT'S TWENTY FIVE POUNDS"]
    assert [level(clip) for clip in speech] == [0.1, 0.2, 0.3, 0.4]
    assert speech[2].known == {"speaker": "121", "chapter": "121726"} and speech.published == 2620
    assert len(speech[0].audio().samples) == 8000  # 0.5 s at 16 kHz
    assert len(LibriSpeech(tmp_path / "LibriSpeech", "test-clean")) == 4
    heard = ["He hoped there would be stew for dinner.", "It is £25!"]
    assert word_error_rate(speech.queries[:2], heard).rate > 0.5
    assert word_error_rate(speech.queries[:2], heard, english_normalizer()).rate == 0


def test_librispeech_counts_audio_without_words_and_words_without_audio(tmp_path: Path) -> None:
    make_librispeech(tmp_path)
    chapter = tmp_path / "LibriSpeech/test-clean/121/121726"
    sound(chapter / "121-121726-0002.flac", 0.1)
    (chapter / "121-121726-0000.flac").unlink()
    with pytest.warns(UserWarning, match="2 of 5 clips are missing"):
        speech = LibriSpeech(tmp_path, "test-clean")
    assert list(speech.missing) == ["121-121726-0000", "121-121726-0002"]
    assert "no text" in speech.missing["121-121726-0002"] and len(speech) == 3


@pytest.mark.parametrize("line", ["1089-134686-0000 AGAIN", "99-1-0000 OF ANOTHER CHAPTER", "NO ID AT ALL"])
def test_librispeech_names_a_line_that_does_not_belong(tmp_path: Path, line: str) -> None:
    make_librispeech(tmp_path)
    with open(tmp_path / "LibriSpeech/test-clean/1089/134686/1089-134686.trans.txt", "a") as file:
        file.write(line + "\n")
    with pytest.raises(MediaError, match=rf"trans\.txt, line 3: '{line}'; expected an id such as 1089-134686-0000"):
        LibriSpeech(tmp_path, "test-clean")


# What all of them do


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("damage", ["gone", "empty", "garbage", "half"])
def test_every_file_broken_in_turn_is_a_clear_error_or_a_counted_skip(
    tmp_path: Path, make: Callable[[Path], Clips], damage: str
) -> None:
    whole = make(tmp_path / "whole")
    decode = (lambda clip: clip.video().frames) if isinstance(whole, (MSRVTT, VATEX, MSVD)) else (lambda c: c.audio())
    used = {clip.path: clip.id for clip in whole}
    for path in sorted(path for path in (tmp_path / "whole").rglob("*") if path.is_file()):
        if path.suffix in {".mp4", ".avi", ".wav", ".flac"} and path not in used:
            continue  # of another split
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", folder)
        target = folder / path.relative_to(tmp_path / "whole")
        data = path.read_bytes()
        match damage:
            case "gone":
                target.unlink()
            case "empty":
                target.write_bytes(b"")
            case "garbage":
                target.write_bytes(b"\xff\xfe\x00" + bytes(range(128, 256)) * 4)
            case "half":
                target.write_bytes(data[: len(data) // 2])
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                clips = reopen(whole, folder)
                broken = SkipBroken(Clips(clips.clips, clips.split, clips.protocol, transform=decode))
                readable = len(broken.readable())
            except MediaError as error:
                # A name that what was broken goes by, and more than the name: what is wrong with it.
                assert target.name in str(error) or target.stem in str(error), (path, error)
                continue
        if path in used:
            assert readable == len(whole) - 1, path
            reasons = [*clips.missing.values(), *broken.broken.values()]
            assert len(reasons) == 1 and (target.stem in reasons[0] or used[path] in clips.missing), path
            assert bool(clips.missing) == any("missing" in str(warning.message) for warning in said)
        elif [clip.texts for clip in clips] == [clip.texts for clip in whole]:
            assert path.name not in READ[whole.split], path
        else:
            assert damage == "half" and any("is the list whole?" in str(warning.message) for warning in said), path


def reopen(clips: Clips, folder: Path) -> Clips:
    split = clips.split.removeprefix("v1 ")
    return type(clips)(folder, split)


# The files with the texts of each split, other than media. Clotho's metadata is nice to have.
READ = {
    "1k-A": {"MSRVTT_JSFUSION_test.csv"},
    "train-9k": {"MSRVTT_data.json", "MSRVTT_train.9k.csv"},
    "validation": {"vatex_validation_v1.0.json"},
    "test": {"AllVideoDescriptions.txt", "test_list.txt"},
    "v1 test": {"test.csv"},
    "development": {"clotho_captions_development.csv"},
    "test-clean": {"1089-134686.trans.txt", "121-121726.trans.txt"},
}


@pytest.mark.parametrize("make", MAKERS)
def test_nothing_left_is_an_error_and_so_are_unknown_splits_and_folders(
    tmp_path: Path, make: Callable[[Path], Clips]
) -> None:
    clips = make(tmp_path / "set")
    with pytest.raises(MediaError, match=r"no split '.*dev'; there are .*test|no split 'dev'; there are development"):
        type(clips)(tmp_path / "set", "dev")
    with pytest.raises(MediaError, match="nowhere"):
        type(clips)(tmp_path / "nowhere", clips.split.removeprefix("v1 "))
    for clip in clips:
        clip.path.unlink()
    with pytest.raises(MediaError, match=rf"none of {len(clips)} clips is there: .*can't open"):
        reopen(clips, tmp_path / "set")


@pytest.mark.parametrize("make", MAKERS)
def test_the_fingerprint_sees_ids_texts_and_media(tmp_path: Path, make: Callable[[Path], Clips]) -> None:
    clips = make(tmp_path)
    before = clips.fingerprint()
    assert before == reopen(clips, tmp_path).fingerprint()
    with open(clips[0].path, "ab") as file:
        file.write(b"more")
    longer = clips.fingerprint()
    assert longer != before
    clips[1].path.unlink()
    with pytest.warns(UserWarning, match="missing"):
        assert reopen(clips, tmp_path).fingerprint() not in (before, longer)


def test_an_id_that_occurs_twice_is_named(tmp_path: Path) -> None:
    make_msrvtt(tmp_path)
    with open(tmp_path / "msrvtt_data/MSRVTT_JSFUSION_test.csv", "a") as file:
        file.write("ret2,msr7020,video7020,another one\n")
    with pytest.raises(MediaError, match=r"1 ids occur more than once, such as \['video7020'\]"):
        MSRVTT(tmp_path, "1k-A")
    text(tmp_path / "msrvtt_data/MSRVTT_JSFUSION_test.csv", "key;vid_key;video_id;sentence\nret0;msr1;video1;a man\n")
    with pytest.raises(MediaError, match=r"has the columns \['key;vid_key;video_id;sentence'\]; expected \['key', "):
        MSRVTT(tmp_path, "1k-A")


def test_two_files_of_one_name_are_not_chosen_between(tmp_path: Path) -> None:
    make_msrvtt(tmp_path)
    video(tmp_path / "compressed/video7020.mp4", 200)
    with pytest.raises(MediaError, match=r"2 files are named alike: .*compressed.*give the folder of one"):
        MSRVTT(tmp_path, "1k-A")
    assert shade(MSRVTT(tmp_path, "1k-A", media=tmp_path / "videos")[1]) == 40
    shutil.copytree(tmp_path / "msrvtt_data", tmp_path / "old")
    with pytest.raises(MediaError, match=r"2 files are named alike: .*MSRVTT_JSFUSION_test\.csv and"):
        MSRVTT(tmp_path, "1k-A", media=tmp_path / "videos")


def test_media_behind_a_link_is_found_and_a_link_in_a_circle_is_no_trap(tmp_path: Path) -> None:
    make_msrvtt(tmp_path / "here")
    shutil.move(tmp_path / "here/videos", tmp_path / "large")
    (tmp_path / "here/videos").symlink_to(tmp_path / "large")
    (tmp_path / "here/all").symlink_to(tmp_path / "here")
    assert ids(MSRVTT(tmp_path / "here", "1k-A")) == ["video9770", "video7020"]


def frames_and_text(clip: Clip) -> dict[str, object]:
    return {"frames": clip.video(frames=2).frames, "text": clip.texts[0]}


def test_a_transform_makes_batches_and_broken_media_is_skipped_by_name(tmp_path: Path) -> None:
    make_msrvtt(tmp_path)
    train = MSRVTT(tmp_path, "train-9k", transform=frames_and_text)
    (batch,) = DataLoader(train, batch_size=4, num_workers=1)
    assert batch["frames"].shape == (4, 2, 16, 16, 3) and batch["text"][3] == "caption 0 of video7010"
    train.clips[1].path.write_bytes(b"<html>Video unavailable</html>")
    with pytest.raises(MediaError, match=r"video1\.mp4: can't read this as video"):
        train[1]
    kept = SkipBroken(train)
    assert [item["text"].split()[-1] for item in (kept[n] for n in range(4))] == [
        "video0", "video6513", "video6513", "video7010",
    ]  # fmt: skip
    assert list(kept.broken) == [1] and "video1.mp4" in kept.broken[1]


def test_a_video_has_no_sound_that_can_be_read_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="can't read this as audio"):
        make_msvd(tmp_path)[0].audio()


def test_real_speech_in_the_layout_of_librispeech_is_read(tmp_path: Path, real: Path) -> None:
    rows = [json.loads(line) for line in (real / "speech/librivox/manifest.jsonl").read_text().splitlines()]
    chapter = tmp_path / "test-clean/7/42"
    chapter.mkdir(parents=True)
    lines = []
    for n, row in enumerate(rows):
        shutil.copy(real / "speech/librivox" / row["path"], chapter / f"7-42-{n:04}.flac")
        lines.append(f"7-42-{n:04} {row['text'].upper()}\n")
    (chapter / "7-42.trans.txt").write_text("".join(lines))
    speech = LibriSpeech(tmp_path, "test-clean")
    assert speech.queries == [row["text"].upper() for row in rows]
    for clip, row in zip(speech, rows, strict=True):
        assert clip.audio().duration == pytest.approx(row["duration"], abs=0.01)
