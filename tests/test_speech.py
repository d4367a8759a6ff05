from __future__ import annotations

import json

import numpy as np
import pytest

from mmqlora import MediaError, SkipBroken, write_audio
from mmqlora.datasets.speech import Speech


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for n in range(4):
        write_audio(tmp_path / f"{n}.wav", rng.uniform(-0.5, 0.5, 800 * (n + 1)).astype(np.float32), 8000)
        rows.append(
            {"path": f"{n}.wav", "text": f"word {n}", "duration": 0.1 * (n + 1), "split": "even odd".split()[n % 2]}
        )
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_items_are_the_manifest_with_samples_at_the_rate_asked_for(folder):
    speech = Speech(folder)
    assert speech.texts == [f"word {n}" for n in range(4)]
    assert [len(speech[n]["samples"]) for n in range(4)] == [1600 * (n + 1) for n in range(4)]
    assert speech[2]["samples"].dtype == np.float32 and speech[2]["split"] == "even"


def test_keep_chooses_lines_and_says_when_it_keeps_none(folder):
    assert Speech(folder, keep=lambda row: row["split"] == "odd").texts == ["word 1", "word 3"]
    with pytest.raises(MediaError, match="none of its 4 lines was kept"):
        Speech(folder, keep=lambda row: False)


def test_the_fingerprint_sees_audio_and_text(folder):
    before = Speech(folder).fingerprint()
    assert before == Speech(folder).fingerprint()
    write_audio(folder / "3.wav", np.zeros(100, np.float32), 8000)
    assert Speech(folder).fingerprint() != before


@pytest.mark.parametrize("line", ["{", '{"path": "a.wav"}', '["a.wav", "text"]'])
def test_a_line_that_is_no_utterance_is_named(folder, line):
    with open(folder / "manifest.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(MediaError, match="line 5"):
        Speech(folder)


def test_a_folder_without_a_manifest_is_named(tmp_path):
    with pytest.raises(MediaError, match=r"manifest\.jsonl: no such file"):
        Speech(tmp_path)


def test_broken_audio_is_an_error_and_can_be_skipped(folder):
    (folder / "1.wav").write_bytes(b"RIFF not audio")
    (folder / "2.wav").unlink()
    speech = Speech(folder)
    for n in (1, 2):
        with pytest.raises(MediaError, match=rf"{n}\.wav"):
            speech[n]
    assert {item["text"] for item in (SkipBroken(speech)[n] for n in range(4))} == {"word 0", "word 3"}
