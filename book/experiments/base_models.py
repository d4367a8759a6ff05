"""Train the three base models of the embedded benchmark on the unshifted world, from nothing.

    cd book && python -m experiments.base_models video       # about 45 minutes on one core
    cd book && python -m experiments.base_models audio       # 35
    cd book && python -m experiments.base_models retrieval   # 30
    cd book && python -m experiments.base_models audio --evaluate   # only score and record what the library holds
    cd book && python -m experiments.base_models audio --again      # train it once more, to see if it comes out alike
    cd book && python -m experiments.base_models audio --bits       # what 4 bits cost, by region

A run that was stopped goes on from its newest checkpoint, in ``--work``. The data never repeats: step s reads items
that no other step reads, so where a run was stopped makes no difference. When it is done, the model is written to the
library's checkpoints in 16 bits, evaluated as `mmqlora.load` gives it back, on 1,000 other items, and recorded.

Besides its own loss each model gets auxiliary ones, from heads that are thrown away: what a frame shows, and which
event begins at it. They make training several times faster.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPTextConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
    VivitConfig,
    VivitImageProcessor,
    WhisperConfig,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

import mmqlora as mm
from mmqlora import benchmark as bench
from mmqlora.benchmark import READERS
from mmqlora.datasets.worlds import COLORS, FRAME_RATE, SHAPES, SOUNDS, VERBS, World
from mmqlora.grids import run_grid
from mmqlora.media import uniform_indices
from mmqlora.records import append_record, fingerprint, make_record

RECORDS = Path(__file__).parent.parent / "records" / "base_models.jsonl"
CHECKPOINTS = Path(mm.__file__).parent / "checkpoints"
TRAIN_SEED = 1_000_000
ITEMS = 1000
VOCABULARY = len(bench.SPECIALS) + len(bench.WORDS)
TOKENS = dict(pad_token_id=bench.PAD, bos_token_id=bench.BOS, eos_token_id=bench.EOS)


class Video(nn.Module):
    """SmolVLM: a tower that sees single frames, one token a frame, a decoder that sees all of them."""

    kind, stages, rate = "clips", {"see": (1000, 64), "tell": (2400, 48)}, 1e-3

    def __init__(self) -> None:
        super().__init__()
        vision = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=2)
        text = dict(hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=3)
        self.model = SmolVLMForConditionalGeneration(
            SmolVLMConfig(
                vision_config=dict(**vision, image_size=32, patch_size=8),
                text_config=dict(
                    model_type="llama",
                    **text,
                    num_key_value_heads=3,
                    vocab_size=VOCABULARY,
                    max_position_embeddings=256,
                    tie_word_embeddings=True,
                    **TOKENS,
                ),
                scale_factor=4,
                image_token_id=bench.IMAGE,
                pad_token_id=bench.PAD,
                tie_word_embeddings=True,
            )
        )
        self.scene = nn.Linear(192, 4 * (5 + 6 + 4))  # each quarter: shape or none, color, turn and displacement
        self.event = nn.Linear(192, 6 + 6 + 4)  # verb or none, color and shape of the subject

    def loss(self, stage: str, items: list, rng: np.random.Generator) -> torch.Tensor:
        if stage == "see":
            picks = [rng.choice(len(item.frames), 4, replace=False) for item in items]
            pixels = bench.pixels(np.concatenate([i.frames[p] for i, p in zip(items, picks, strict=True)]))
            truth = [_scene(item, p) for item, p in zip(items, picks, strict=True)]
            return self.scene_loss(self.see(pixels), truth)
        # A still stretch shows one frame many times: each different one goes through the tower once.
        unique, place = [], []
        for item in items:
            flat = item.frames.reshape(len(item.frames), -1)
            new = np.r_[True, (flat[1:] != flat[:-1]).any(1)]
            place.append(len(unique) + np.cumsum(new) - 1)
            unique.extend(item.frames[new])
        seen = self.see(bench.pixels(np.stack(unique)))
        truth = [
            _scene(item, np.flatnonzero(np.r_[True, np.diff(p) > 0])) for item, p in zip(items, place, strict=True)
        ]
        loss = self.scene_loss(seen, truth)
        batch = READERS["video"].collate([READERS["video"].encode(item, *_ask(item, rng)) for item in items])
        words = self.model.get_input_embeddings()(batch["input_ids"])
        is_frame = batch["input_ids"] == bench.IMAGE
        words = words.masked_scatter(is_frame[..., None], seen[torch.from_numpy(np.concatenate(place))])
        out = self.model.model.text_model(
            inputs_embeds=words, attention_mask=batch["attention_mask"], output_hidden_states=True
        )
        logits = self.model.lm_head(out.last_hidden_state)
        tell = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
        events = self.event(out.hidden_states[2][is_frame])
        truth = torch.from_numpy(np.concatenate([_events(item) for item in items]))
        loss = 0.3 * loss + tell
        for part, target in zip(events.split([6, 6, 4], -1), truth.T, strict=True):
            loss = loss + F.cross_entropy(part, target, ignore_index=-100)
        return loss

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.cat(list(self.model.get_image_features(pixels[:, None]).pooler_output)).view(len(pixels), 192)

    def scene_loss(self, seen: torch.Tensor, truth: list) -> torch.Tensor:
        shape, color, place = (torch.from_numpy(np.concatenate(part)) for part in zip(*truth, strict=True))
        out = self.scene(seen).view(-1, 4, 15)
        there = shape.flatten() < 4
        return (
            F.cross_entropy(out[..., :5].flatten(0, 1), shape.flatten())
            + F.cross_entropy(out[..., 5:11].flatten(0, 1)[there], color.flatten()[there])
            + F.mse_loss(out[..., 11:].flatten(0, 1)[there], place.flatten(0, 1)[there])
        )


class Audio(nn.Module):
    """Whisper: an encoder over six seconds of mel steps, a decoder that reads it."""

    kind, stages, rate = "sounds", {"tell": (2000, 32)}, 1e-3

    def __init__(self) -> None:
        super().__init__()
        sizes = dict(encoder_layers=3, decoder_layers=3, encoder_attention_heads=3, decoder_attention_heads=3)
        self.model = WhisperForConditionalGeneration(
            WhisperConfig(
                vocab_size=VOCABULARY,
                num_mel_bins=64,
                d_model=192,
                **sizes,
                encoder_ffn_dim=512,
                decoder_ffn_dim=512,
                max_source_positions=150,
                max_target_positions=64,
                decoder_start_token_id=bench.BOS,
                begin_suppress_tokens=None,
                **TOKENS,
            )
        )
        self.sound = nn.Linear(192, len(SOUNDS) + 1)

    def loss(self, stage: str, items: list, rng: np.random.Generator) -> torch.Tensor:
        batch = READERS["audio"].collate([READERS["audio"].encode(item, *_ask(item, rng)) for item in items])
        out = self.model(**batch)
        truth = np.full((len(items), 150), len(SOUNDS))
        for row, item in zip(truth, items, strict=True):
            for event in item.events:
                row[round(25 * event.start) : round(25 * event.stop)] = SOUNDS.index(event.subject)
        heads = self.sound(out.encoder_last_hidden_state)
        return out.loss + 0.5 * F.cross_entropy(heads.flatten(0, 1), torch.from_numpy(truth).flatten())


class Retrieval(nn.Module):
    """CLIP-style: a ViViT that merges four frames into each token, beside CLIP's text model."""

    kind, stages, rate = "clips", {"tell": (1200, 64)}, 1e-3

    def __init__(self) -> None:
        super().__init__()
        vision = VivitConfig(
            image_size=32,
            num_frames=bench.CLIP_FRAMES,
            tubelet_size=[4, 8, 8],
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=3,
            hidden_act="gelu",
        )
        text = CLIPTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=64,
            **TOKENS,
        )
        config = VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=128)
        self.model = VisionTextDualEncoderModel(config)
        # Each quarter in each tubelet: shape or none and color in its first and last frame, and what happens there.
        self.scene = nn.Linear(192, 2 * (5 + 6) + 5)
        # The story, event by event, off either side's pooled output: verb or none, color and shape of the subject.
        self.seen, self.told = nn.Linear(192, 5 * 16), nn.Linear(128, 5 * 16)

    def loss(self, stage: str, items: list, rng: np.random.Generator) -> torch.Tensor:
        near = [bench.ids(n) for item in items for n in item.negatives[:1]]
        examples = [READERS["retrieval"].encode(item) for item in items]
        clips = torch.stack([example["pixel_values"] for example in examples])
        texts = [e["input_ids"] for e in examples] + [torch.tensor([bench.BOS, *n, bench.EOS]) for n in near]
        texts = nn.utils.rnn.pad_sequence(texts, True, bench.PAD)
        vision = self.model.vision_model(pixel_values=clips, output_hidden_states=True)
        texts_out = self.model.text_model(input_ids=texts, attention_mask=(texts != bench.PAD).long())
        image = F.normalize(self.model.visual_projection(vision.pooler_output), dim=-1)
        text = F.normalize(self.model.text_projection(texts_out.pooler_output), dim=-1)
        scores = self.model.logit_scale.exp().clamp(max=100) * image @ text.T
        target = torch.arange(len(items))
        loss = 0.5 * (F.cross_entropy(scores, target) + F.cross_entropy(scores[:, : len(items)].T, target))
        states = vision.hidden_states[2][:, 1:].view(len(items), bench.CLIP_FRAMES // 4, 2, 2, 2, 2, 192)
        parts = self.scene(states.mean((3, 5))).flatten(0, 3).split([5, 6, 5, 6, 5], -1)  # (B T 4, ...)
        truth = [torch.from_numpy(np.stack(part)) for part in zip(*map(_tubelets, items), strict=True)]
        for shape, color, looks, colors in ((*parts[:2], *truth[:2]), (*parts[2:4], *truth[2:4])):
            looks, colors = looks.flatten(), colors.flatten()
            loss = loss + 0.3 * F.cross_entropy(shape, looks)
            loss = loss + 0.3 * F.cross_entropy(color[looks < 4], colors[looks < 4])
        loss = loss + F.binary_cross_entropy_with_logits(parts[4], truth[4].flatten(0, 2), pos_weight=torch.tensor(5.0))
        story = torch.from_numpy(np.stack([_story(item) for item in items]))
        for head, pooled in ((self.seen, vision.pooler_output), (self.told, texts_out.pooler_output[: len(items)])):
            for part, target in zip(head(pooled).view(-1, 16).split([6, 6, 4], -1), story.view(-1, 3).T, strict=True):
                loss = loss + 0.3 * F.cross_entropy(part, target, ignore_index=-100)
        return loss


MODELS = {"video": Video, "audio": Audio, "retrieval": Retrieval}


def _ask(item, rng: np.random.Generator) -> tuple[str, str]:
    """A prompt and its answer: mostly the caption, else one of the questions."""
    if rng.random() < 0.8:
        return "describe", item.caption
    question = item.questions[rng.integers(len(item.questions))]
    return question.text, question.answer


def _scene(item, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What each quarter's inhabitant looks like in some frames: shape, color, (turn, displacement)."""
    shape, color = np.full((len(frames), 4), 4), np.zeros((len(frames), 4), int)
    place = np.zeros((len(frames), 4, 4), np.float32)
    for track in item.tracks:
        there = track.visible[frames]
        shape[there, track.cell], color[there, track.cell] = track.shape, track.color[frames][there]
        turn = track.angle[frames] * np.pi / 4 * (0, 4, 3, 4)[track.shape]
        dx, dy = ((a - a[0])[frames] / 4 for a in (track.x, track.y))
        place[:, track.cell] = np.stack([np.cos(turn), np.sin(turn), dx, dy], -1)
    return shape, color, place


def _events(item) -> np.ndarray:
    """For each frame the event that begins at it: verb (0 none), color and shape of its subject (-100 none)."""
    truth = np.tile([0, -100, -100], (len(item.frames), 1))
    for event in item.events:
        color, shape = event.subject.split()
        verb = VERBS.index(event.predicate.split()[0])
        truth[round(event.start * FRAME_RATE)] = 1 + verb, COLORS.index(color), SHAPES.index(shape)
    return truth


def _tubelets(item) -> tuple[np.ndarray, ...]:
    """For each tubelet and quarter: shape and color in the first frame and in the last, and which verbs happen."""
    frames = uniform_indices(len(item.frames), bench.CLIP_FRAMES)
    first, last = (_scene(item, frames[start::4])[:2] for start in (0, 3))
    happens = np.zeros((len(frames) // 4, 4, 5), np.float32)
    cells = {_look(track, frame): track.cell for track in item.tracks for frame in range(len(item.frames))}
    for event in item.events:
        at = min(int(np.searchsorted(frames, round(event.start * FRAME_RATE))), len(frames) - 1)
        happens[at // 4, cells[event.subject], VERBS.index(event.predicate.split()[0])] = 1
    return *first, *last, happens


def _look(track, frame: int) -> str:
    return f"{COLORS[track.color[frame]]} {SHAPES[track.shape]}"


def _story(item) -> np.ndarray:
    """Verb (0 none), color and shape (-100 none) of the subject of each of five events."""
    truth = np.tile([0, -100, -100], (5, 1))
    for row, event in zip(truth, item.events, strict=False):
        color, shape = event.subject.split()
        row[:] = 1 + VERBS.index(event.predicate.split()[0]), COLORS.index(color), SHAPES.index(shape)
    return truth


def train(name: str, work: Path) -> nn.Module:
    torch.manual_seed(0)
    maker = MODELS[name]
    model = maker()
    path = work / f"{name}.safetensors"
    done = -1
    state = load_file(path) if path.exists() else {}
    if state:
        done = int(state["step"])
        model.load_state_dict({k[6:]: v for k, v in state.items() if k.startswith("model.")}, strict=False)
    first = 0
    world = World(maker.kind, count=10**9, seed=TRAIN_SEED)
    for stage, (steps, batch) in maker.stages.items():
        if done >= first + steps - 1:
            first += steps
            continue
        optimizer = torch.optim.AdamW(model.parameters(), lr=maker.rate, weight_decay=0.01, betas=(0.9, 0.98))
        if done >= first:
            _restore(optimizer, model, state)
        model.train()
        start, shown = time.perf_counter(), []
        for step in range(max(0, done + 1 - first), steps):
            for group in optimizer.param_groups:
                group["lr"] = maker.rate * min(
                    (step + 1) / 100, 0.02 + 0.98 * (0.5 + 0.5 * np.cos(np.pi * step / steps))
                )
            at = (first + step) * 64
            items = [world[i] for i in range(at, at + batch)]
            loss = model.loss(stage, items, np.random.default_rng([TRAIN_SEED, first + step]))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            shown.append(float(loss))
            if (step + 1) % 50 == 0 or step + 1 == steps:
                _keep(path, model, optimizer, first + step)
                rate = (time.perf_counter() - start) / len(shown)
                print(
                    f"{name} {stage} {step + 1}/{steps} loss {np.mean(shown[-50:]):.3f} {rate:.2f} s/step", flush=True
                )
        first += steps
    return model


def _keep(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    state = {f"model.{k}": v.contiguous().clone() for k, v in model.state_dict().items()}
    state["step"] = torch.tensor(step)
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"{key}.{name}"] = value.clone()
    save_file(state, f"{path}.new")
    os.replace(f"{path}.new", path)


def _restore(optimizer: torch.optim.Optimizer, model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if f"step.{name}" in state:
            optimizer.state[parameter] = {k: state[f"{k}.{name}"] for k in ("step", "exp_avg", "exp_avg_sq")}


def export(name: str, model: nn.Module, folder: Path) -> None:
    """Write the model in float16, its tokenizer or processor, and its card."""
    tokenizer = bench.word_tokenizer()
    inner = model.model.to(torch.float16)
    if name == "audio":
        inner.generation_config.update(suppress_tokens=None, begin_suppress_tokens=None, max_length=None)
        processor = WhisperProcessor(bench.feature_extractor(), tokenizer)
    elif name == "retrieval":
        side = dict(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        processor = VisionTextDualEncoderProcessor(VivitImageProcessor(**side), tokenizer)
    else:
        processor = tokenizer
    inner.save_pretrained(folder)
    processor.save_pretrained(folder)


def assess(name: str, folder: Path) -> dict:
    """Score a model on 1,000 items that nothing was trained on, in 16 bits and in NF4."""
    task = bench.TASKS[f"{name}/none"]
    world = World(task.reader.kind, ITEMS, bench.TEST)
    items, metrics, kept = list(world), {}, {}
    for bits, quant_type in (("16-bit", None), ("nf4", "nf4")):
        model = mm.load(folder, quant_type=quant_type)[0]
        scores = bench.evaluate(model, task.reader, items)
        kept |= {f"{bits} {measure}": values for measure, values in scores.pop("items").items()}
        if name != "retrieval":
            scores |= {f"answers {sort}": v for sort, v in bench.answer_questions(model, task.reader, items).items()}
        metrics |= {f"{bits} {measure}": value for measure, value in scores.items()}
    config = {"model": name, "stages": MODELS[name].stages, "rate": MODELS[name].rate, "items": ITEMS}
    weights = fingerprint(folder / "model.safetensors")
    measured = {
        "metrics": metrics,
        "items": kept,
        "weights": weights,
        "parameters": sum(p.numel() for p in mm.load(folder, quant_type=None)[0].parameters()),
    }
    return make_record("base_models", config, 0, data=world.fingerprint(), measured=measured)


def in_few_bits(config: dict, seed: int) -> dict:
    """One run of ``--bits``: the scores of a model some of whose regions are quantized."""
    task = bench.TASKS[f"{config['model']}/none"]
    world = World(task.reader.kind, config["items"], bench.TEST)
    model = task.load()
    if config["quant_type"]:
        others = sorted({row.region for row in mm.regions(model).rows} - set(config["regions"]))
        mm.quantize(model, config["quant_type"], exclude=others)
    metrics = bench.evaluate(model, task.reader, list(world))
    items = metrics.pop("items")
    measured = {"metrics": metrics, "items": items}
    return make_record("base_models_bits", config, seed, data=world.fingerprint(), measured=measured)


def bits_runs(name: str) -> list[tuple[dict, int]]:
    """Each region alone and all together, in each 4-bit format."""
    regions = list(dict.fromkeys(row.region for row in mm.regions(bench.TASKS[f"{name}/none"].load()).rows))
    common = {"model": name, "items": 500}
    runs = [{**common, "quant_type": None, "regions": []}]
    for quant_type in ("nf4", "fp4"):
        runs += [{**common, "quant_type": quant_type, "regions": part} for part in (*([r] for r in regions), regions)]
    return [(config, 0) for config in runs]


def card(name: str, record: dict) -> str:
    """The model card, whose numbers come from the record."""
    metrics = record["metrics"]
    rows = "".join(
        f"| {measure} | {metrics[f'16-bit {measure}']:.3f} | {metrics[f'nf4 {measure}']:.3f} |\n"
        for measure in (key.removeprefix("16-bit ") for key in metrics if key.startswith("16-bit "))
    )
    return f"""---
license: apache-2.0
library_name: transformers
---
# mmqlora/{name}

{MODELS[name].__doc__}

A base model of the embedded benchmark of *Less is more: multimodal learning with QLoRA*. It has
{record["parameters"]:,} parameters and was trained from nothing on generated {MODELS[name].kind} without any shift
(`mmqlora.datasets.worlds`), by `python -m experiments.base_models {name}`. It knows those and nothing else: it is a
test bench, not a model to use.

    model, processor = mmqlora.load("mmqlora/{name}", quant_type="nf4")

On {record["config"]["items"]:,} held-out items (run {record["id"]} in `book/records/base_models.jsonl`):

| | 16 bits | NF4 |
|---|---|---|
{rows}"""


def main() -> None:
    """Train, export, score and record one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--work", type=Path, default=Path("../.book/base_models"), help="folder of checkpoints")
    parser.add_argument("--evaluate", action="store_true", help="don't train")
    parser.add_argument("--again", action="store_true", help="leave the library's model, record in base_models_again")
    parser.add_argument("--bits", action="store_true", help="only measure what 4 bits cost")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.bits:
        path = RECORDS.with_name("base_models_bits.jsonl")
        run_grid("experiments.base_models:in_few_bits", bits_runs(arguments.model), path)
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    folder = (arguments.work / "again" if arguments.again else CHECKPOINTS) / arguments.model
    if not arguments.evaluate:
        export(arguments.model, train(arguments.model, arguments.work), folder)
    record = assess(arguments.model, folder)
    append_record(RECORDS.with_name("base_models_again.jsonl") if arguments.again else RECORDS, record)
    print(record["metrics"])
    if arguments.again:
        return
    (CHECKPOINTS / arguments.model / "README.md").write_text(card(arguments.model, record), encoding="utf-8")


if __name__ == "__main__":
    main()
