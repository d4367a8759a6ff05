"""The embedded benchmark: readers, scores, tasks, and the models that come with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import mmqlora as mm
from mmqlora import benchmark, quantization
from mmqlora.benchmark import BOS, EOS, IMAGE, READERS, TASKS
from mmqlora.datasets.worlds import SHIFTS, WORDS, World

MODELS = sorted(READERS)


@pytest.fixture(scope="module")
def models():
    return {name: TASKS[f"{name}/none"].load() for name in MODELS}


def items_of(name, count=100, seed=7, **options):
    return list(World(READERS[name].kind, count, seed, **options))


def test_checkpoints_are_small_safe_and_described():
    folders = {path.parent.name: path.parent for path in quantization.CHECKPOINTS.glob("*/config.json")}
    assert sorted(folders) == MODELS
    for folder in folders.values():
        assert not [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pkl", ".py")]
        assert (folder / "model.safetensors").stat().st_size <= 10e6
        assert "held-out items" in (folder / "README.md").read_text()


@pytest.mark.parametrize("name", MODELS)
def test_models_have_the_promised_size_and_class(models, name):
    model = models[name]
    assert 1e6 <= sum(p.numel() for p in model.parameters()) <= 5e6
    assert type(model).__module__.startswith("transformers.models.")
    # So that 4 bits mean the same on every machine.
    assert all(row.shape[1] % 64 == 0 for row in mm.regions(model).rows)


def test_an_unknown_model_of_ours_is_a_clear_error():
    with pytest.raises(mm.QuantizationError, match=r"mmqlora/vidoe.*mmqlora/video"):
        mm.load("mmqlora/vidoe")


@pytest.mark.parametrize("name", MODELS)
def test_the_saved_tokenizer_is_the_library_s(name):
    processor = mm.load(f"mmqlora/{name}", quant_type=None)[1]
    tokenizer = getattr(processor, "tokenizer", processor)
    text = " ".join(WORDS)
    assert tokenizer(text, add_special_tokens=False).input_ids == benchmark.ids(text)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BOS, EOS)
    assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE
    if name == "audio":
        item = items_of("audio", 1)[0]
        read = processor.feature_extractor(item.audio.samples, sampling_rate=16000, return_tensors="pt").input_features
        assert torch.equal(read[0], READERS["audio"].encode(item)["input_features"])


@pytest.mark.parametrize("name", ["audio", "video"])
def test_base_models_are_as_good_as_their_record_says(models, name):
    record = mm.read_records(Path(__file__).parent.parent / "book/records/base_models.jsonl")
    promised = {r["config"]["model"]: r["metrics"] for r in record}[name]
    assert promised["16-bit exact_match"] >= 0.85
    scores = benchmark.evaluate(models[name], READERS[name], items_of(name, 50, benchmark.TEST))
    # 50 of the 1,000 items of the record: three standard errors.
    share = promised["16-bit exact_match"]
    assert scores["exact_match"] >= share - 3 * np.sqrt(max(share * (1 - share), 0.01) / 50)


def test_retrieval_is_as_good_as_its_record_says(models):
    record = mm.read_records(Path(__file__).parent.parent / "book/records/base_models.jsonl")
    promised = {r["config"]["model"]: r["metrics"] for r in record}["retrieval"]
    assert promised["16-bit recall_at_1"] >= 0.8
    scores = benchmark.evaluate(models["retrieval"], READERS["retrieval"], items_of("retrieval", 100, benchmark.TEST))
    assert scores["recall_at_1"] >= promised["16-bit recall_at_1"] - 0.12


@pytest.mark.parametrize("name", ["audio", "video"])
def test_padding_changes_nothing(models, name):
    reader, items = READERS[name], items_of(name, 6)
    examples = [reader.encode(item) for item in items]
    with torch.no_grad():
        together = reader.losses(models[name], examples)
        alone = torch.cat([reader.losses(models[name], [example]) for example in examples])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)
    assert reader.answers(models[name], items) == [reader.answers(models[name], [item])[0] for item in items]


@pytest.mark.parametrize("name", ["audio", "video"])
def test_losses_are_the_model_s_own(models, name):
    reader = READERS[name]
    examples = [reader.encode(item) for item in items_of(name, 5)]
    batch = reader.collate(examples)
    with torch.no_grad():
        own, losses = models[name](**batch).loss, reader.losses(models[name], examples)
    said = torch.tensor([float((e["labels"] != -100).sum()) for e in examples])
    torch.testing.assert_close((losses * said).sum() / said.sum(), own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["audio", "video"])
def test_labels_are_the_answer_and_nothing_else(name):
    item = items_of(name, 1)[0]
    for prompt, answer in (("describe", item.caption), (item.questions[0].text, item.questions[0].answer)):
        example = READERS[name].encode(item, prompt, answer)
        labels = example["labels"]
        assert labels[labels != -100].tolist() == [*benchmark.ids(answer), EOS]


def test_a_clip_is_a_token_a_frame():
    item = items_of("video", 1)[0]
    example = READERS["video"].encode(item)
    assert int((example["input_ids"] == IMAGE).sum()) == len(item.frames) == len(example["pixel_values"])
    # SmolVLM leaves out frames that are all zero.
    assert not (benchmark.pixels(np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)) == 0).any()


class Fixed(torch.nn.Module):
    """A dual encoder whose embeddings are given: clip i points along axis i, and so do texts, but for some."""

    def __init__(self, texts):
        super().__init__()
        self.texts, self.calls = texts, 0

    def forward(self, **batch):
        self.calls += 1
        out = torch.nn.Module()
        out.image_embeds = torch.eye(len(self.texts))
        out.text_embeds = self.texts if self.calls % 2 else torch.zeros_like(self.texts)
        return out


def test_retrieval_ranks_in_closed_form():
    items, reader = items_of("retrieval"), READERS["retrieval"]
    assert len({item.caption for item in items}) > 95
    perfect = benchmark.evaluate(Fixed(torch.eye(100)), reader, items)
    assert perfect["recall_at_1"] == perfect["reciprocal_rank"] == perfect["order"] == 1
    # One score for all: a tie counts against the right one, so it comes last among captions that differ.
    blind = benchmark.evaluate(Fixed(torch.ones(100, 100)), reader, items)
    assert blind["recall_at_1"] == 0
    assert blind["items"]["reciprocal_rank"][0] == pytest.approx(1 / 100, abs=2e-3)
    # Texts of the first two are exchanged: both are found second, in both directions; the others stay first.
    swapped = torch.eye(100)
    swapped[[0, 1]] = torch.tensor([[0.5, 1.0], [1.0, 0.5]]) @ torch.eye(100)[:2]
    scores = benchmark.evaluate(Fixed(swapped), reader, items)["items"]
    assert scores["reciprocal_rank"][:3] == [0.5, 0.5, 1.0]


def test_equal_captions_do_not_compete():
    items = items_of("retrieval", 99)
    items.append(items[0])
    texts = torch.eye(100)
    texts[99] = texts[0]
    texts[0, 99] = 1.0
    scores = benchmark.evaluate(Fixed(texts), READERS["retrieval"], items)
    assert scores["items"]["recall_at_1"][0] == 1.0


def test_retrieval_wants_whole_pools(models):
    with pytest.raises(mm.MMQLoRAError, match="99 items"):
        benchmark.evaluate(models["retrieval"], READERS["retrieval"], items_of("retrieval", 99))


def test_word_accuracy_and_exact_match_in_closed_form(monkeypatch):
    items, reader = items_of("audio", 4), READERS["audio"]
    captions = [item.caption for item in items]
    said = [captions[0], captions[1] + " once", "", " ".join(["noise"] * 99)]
    monkeypatch.setattr(reader, "answers", lambda model, part, prompts=None: said)
    monkeypatch.setattr(reader, "losses", lambda model, examples: torch.zeros(len(examples)))
    scores = benchmark.evaluate(torch.nn.Identity(), reader, items)["items"]
    assert scores["exact_match"] == [1, 0, 0, 0]
    words = len(captions[1].split())
    assert scores["word_accuracy"] == pytest.approx([1, 1 - 1 / words, 0, 0], abs=1e-4)


def test_splits_share_no_item_and_tests_are_fixed():
    task = TASKS["audio/hiss"]
    seen = [
        {item.caption + str(item.events) for item in split}
        for split in (
            [task.train(1).world[i] for i in range(50)],
            [task.train(2).world[i] for i in range(50)],
            task.judge(count=50).keywords["items"],
            task.judge(validation=True, count=50).keywords["items"],
        )
    ]
    assert all(not one & other for i, one in enumerate(seen) for other in seen[:i])
    first, again = (task.judge(count=50).keywords["items"] for _ in range(2))
    assert all(np.array_equal(a.audio.samples, b.audio.samples) for a, b in zip(first, again, strict=True))


def test_every_task_is_named_after_its_shifts():
    for name, task in TASKS.items():
        assert name == task.name
        assert task == benchmark.task(name)
        assert set(task.shifts) <= set(SHIFTS)
    assert benchmark.Task("video", {"palette": 0.5, "words": 1.0}).name == "video/palette 0.5+words"
    assert {f"{model}/none" for model in MODELS} <= set(TASKS)
    with pytest.raises(mm.MMQLoRAError, match="the models are video, audio, retrieval"):
        benchmark.task("palette")


def test_one_short_run_brings_back_part_of_what_a_shift_cost(models):
    task = TASKS["audio/timbre"]
    judge = task.judge(validation=True, count=40)
    model = mm.adapt(task.load(), "lora", quant_type="nf4")
    before = judge(model)["loss"]
    record = mm.fine_tune(
        model,
        task.train(0),
        judge,
        collate=task.collate,
        steps=12,
        batch_size=16,
        learning_rate=3e-3,
        bf16=False,
        progress=False,
    )
    assert record["metrics"]["loss"] < 0.8 * before
    assert len(record["items"]["word_accuracy"]) == 40


def shift_records():
    table: dict[str, dict[str, dict]] = {}
    for record in mm.read_records(Path(__file__).parent.parent / "book/records/shifts.jsonl"):
        table.setdefault(record["config"]["task"], {})[record["config"]["method"]] = record["metrics"]
    return table


@pytest.mark.parametrize("task", [task for task in TASKS if not task.endswith(("none", "palette 0.5", "timbre 0.5"))])
def test_every_shift_hurts_and_full_fine_tuning_repairs_half_of_it(task):
    model = task.split("/")[0]
    measure = "reciprocal_rank" if model == "retrieval" else "word_accuracy"
    table = shift_records()
    start, hurt, mended = (table[n][m][measure] for n, m in ((f"{model}/none", "none"), (task, "none"), (task, "full")))
    assert start - hurt >= 0.2
    assert mended - hurt >= 0.5 * (start - hurt)
    assert hurt > 0.05  # off the floor


def test_questions_are_scored_by_sort(monkeypatch):
    items, reader = items_of("audio", 20), READERS["audio"]
    known = {(item.index, q.text): q.answer for item in items for q in item.questions}

    def oracle(model, part, prompts):
        assert len({len(prompt.split()) for prompt in prompts}) == 1
        return [known[item.index, p] if p.startswith("how many") else "" for item, p in zip(part, prompts, strict=True)]

    monkeypatch.setattr(reader, "answers", oracle)
    shares = benchmark.answer_questions(torch.nn.Identity(), reader, items)
    assert shares["how many"] == 1 and shares["what"] == shares["when"] == shares["order"] == 0


def test_a_soft_prompt_takes_no_part_in_the_loss():
    """Its virtual tokens come before the clip, so that there are more logits than labels."""
    task = benchmark.TASKS["video/none"]
    model = mm.adapt(task.load(), "prompt").eval()
    example = task.train(0)[0]
    with torch.no_grad():
        alone = model(**task.collate([example])).loss
        assert torch.allclose(task.reader.losses(model, [example]), alone, atol=1e-5)
