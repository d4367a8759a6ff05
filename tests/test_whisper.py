from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, WhisperForConditionalGeneration

from mmqlora import MediaError, MMQLoRAError
from mmqlora.datasets.speech import Speech
from mmqlora.whisper import collate, prepare, short_window, transcribe


@pytest.fixture(scope="module")
def processor(real):
    return AutoProcessor.from_pretrained(real / "models" / "whisper-tiny.en")


@pytest.fixture(scope="module")
def model(real):
    return WhisperForConditionalGeneration.from_pretrained(real / "models" / "whisper-tiny.en", dtype=torch.float32)


@pytest.fixture(scope="module")
def speech(real):
    speech = Speech(real / "speech" / "librivox")
    speech.rows = [row for row in speech.rows if "sense_and_sensibility" in row["path"]][:4]
    return speech


def test_labels_say_the_text_and_leave_out_what_generation_forces(processor, speech):
    for item, example in zip(speech.rows, prepare(speech, processor), strict=True):
        labels = example["labels"]
        assert processor.tokenizer.decode(labels[labels >= 0], skip_special_tokens=True) == " " + item["text"].strip()
        assert labels[0] == -100 and (labels[1:] >= 0).all()
        assert labels[-1] == processor.tokenizer.eos_token_id


def test_the_loss_at_the_true_text_is_that_of_a_model_that_hears_it(model, processor, speech):
    """With shifted, misplaced or unmasked labels the loss of a good model would be several nats."""
    batch = collate(prepare(speech, processor))
    with torch.no_grad():
        right = model(**batch).loss
        wrong = model(input_features=batch["input_features"].roll(1, 0), labels=batch["labels"]).loss
    assert right < 1.5 < 3 < wrong


def test_a_batch_is_its_items_with_padding_that_counts_nothing(model, processor, speech):
    examples = prepare(speech, processor, window=10.0)
    with torch.no_grad(), short_window(model, 10.0):
        together = model(**collate(examples)).loss
        counts = [int((e["labels"] >= 0).sum()) for e in examples]
        alone = [model(**collate([e])).loss * n for e, n in zip(examples, counts, strict=True)]
    assert together.item() == pytest.approx(sum(alone).item() / sum(counts), rel=1e-4)


def test_it_writes_down_what_is_said(model, processor, speech):
    texts = transcribe(model, processor, prepare(speech, processor), batch_size=3, progress=False)
    said = [set(row["text"].lower().split()) for row in speech.rows]
    heard = [set(text.lower().replace(".", "").replace(",", "").split()) for text in texts]
    found = sum(len(a & b) for a, b in zip(said, heard, strict=True)) / sum(map(len, said))
    assert found > 0.8


def test_a_short_window_ends_with_its_block_and_windows_nest(model, processor, speech):
    whole = collate(prepare(speech, processor)[:1])
    with torch.no_grad():
        before = model(**whole).logits
        with short_window(model, 5.0):
            assert model.get_encoder()(whole["input_features"][..., :500]).last_hidden_state.shape[1] == 250
            with short_window(model, 30.0):
                inside = model(**whole).logits
            assert model.config.max_source_positions == 250
        after = model(**whole).logits
    assert torch.equal(before, inside) and torch.equal(before, after)
    assert model.config.max_source_positions == 1500


def test_the_window_is_restored_when_the_block_fails(model):
    with pytest.raises(ZeroDivisionError), short_window(model, 5.0):
        _ = 1 / 0
    assert model.model.encoder.embed_positions.weight.shape[0] == model.config.max_source_positions == 1500


@pytest.mark.parametrize("window", [0.0, -1.0, 31.0])
def test_a_window_out_of_range_is_refused(model, window):
    with pytest.raises(MMQLoRAError, match="at most 30 s"), short_window(model, window):
        pass


def test_a_model_without_a_whisper_encoder_is_refused():
    with pytest.raises(MMQLoRAError, match="no Whisper encoder"), short_window(torch.nn.Linear(2, 2), 5.0):
        pass


def test_speech_that_does_not_fit_or_is_not_finite_is_named(processor, speech):
    with pytest.raises(MediaError, match=r"\.flac is .* s long, the window 1 s"):
        prepare(speech, processor, window=1.0)
    broken = [{"samples": np.full(1600, np.nan, np.float32), "text": "x", "path": "a.wav"}]
    with pytest.raises(MediaError, match=r"a\.wav holds samples that are not finite"):
        prepare(broken, processor)
