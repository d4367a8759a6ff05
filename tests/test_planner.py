"""Memory that is predicted, against memory that is counted, and the arithmetic between them."""

from __future__ import annotations

import gc

import pytest
import torch
import transformers as tf
from architectures import ARCHITECTURES, DECODER
from hypothesis import given, settings
from hypothesis import strategies as st
from rehearsals import compare
from torch import nn

import mmqlora as mm
from mmqlora.__main__ import main
from mmqlora.allocator import MIB, reserved
from mmqlora.errors import PlanError
from mmqlora.inputs import Sizes, make_inputs
from mmqlora.ledger import Ledger
from mmqlora.planner import CHANGES, GPUS, plan
from mmqlora.rehearsal import OPTIMIZERS, QUICK, hollow, rehearse, tower

pytestmark = pytest.mark.filterwarnings("ignore")

# The ledger


def test_ledger_counts_memory_once_and_as_long_as_something_needs_it():
    weight = torch.randn(1000, 1000, requires_grad=True)
    with Ledger() as ledger:
        saved = weight.exp()
        total = saved.sum()
        view = saved.view(-1)[::2]
        assert ledger.total == 4_000_000 + 4
        del saved, view
        gc.collect()
        assert ledger.total == 4_000_000 + 4  # autograd needs it
        total.backward()
        assert ledger.total == 4_000_000 + 4  # the gradient is there, what was saved is gone
        assert ledger.peak == 8_000_000 + 8  # with the sum and its gradient
        weight.grad = None
    assert ledger.total == 4


def test_ledger_knows_parts_of_a_model_and_kinds():
    model = ARCHITECTURES["SmolVLM"]()
    sizes = {"vision": 0, "fusion": 0, "text": 0}
    with Ledger(model) as ledger:
        pass
    for (kind, region), size in ledger.at_peak.items():
        assert kind == "weights"
        sizes[region] += size
    # The head is tied to the embeddings, and is counted once.
    assert sum(sizes.values()) >= sum(4 * parameter.numel() for parameter in model.parameters())
    vision = sum(4 * p.numel() for p in model.model.vision_model.parameters())
    assert vision <= sizes["vision"] < 1.1 * vision  # with its buffers
    assert all(sizes.values())


# The rehearsal

RUNS = [
    ("Whisper", "lora", "nf4", False),
    ("wav2vec2 CTC", "lora", None, False),
    ("SmolVLM", "lora", "nf4", True),
    ("SmolVLM", "full", None, False),
    ("Qwen2.5-VL", "lora", "nf4", False),
    ("LLaVA-OneVision", "lora", None, True),
    ("CLIP", "full", None, False),
    ("InstructBLIP-video", "lora", "nf4", False),
]


@pytest.mark.parametrize("name, method, quant_type, checkpointing", RUNS)
def test_a_rehearsed_step_holds_what_the_real_one_holds(name, method, quant_type, checkpointing):
    found = compare(name, method, quant_type, checkpointing, (4, 4))
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.01)


def test_hollow_four_bit_weights_are_as_large_as_real_ones():
    real = mm.quantize(ARCHITECTURES["Qwen2-Audio"](), "nf4")
    with torch.device("meta"):
        skeleton = ARCHITECTURES["Qwen2-Audio"]()
    assert [layer.bytes_after for layer in mm.quantize(skeleton, "nf4").layers] == [
        layer.bytes_after for layer in real.layers
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hollow_four_bit_layers_compute_in_the_type_of_their_weights(dtype):
    with torch.device("meta"):
        skeleton = ARCHITECTURES["Llama"]().to(dtype)
    mm.quantize(skeleton, "nf4")
    layers = [module for module in skeleton.modules() if hasattr(module, "compute_dtype")]
    assert layers and {module.compute_dtype for module in layers} == {dtype}


def rehearsed(optimizer: str, width: int = 512) -> Ledger:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(width, width, bias=False)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.linear(x).sum()}

    model = Model()
    hollow(model)
    return rehearse(model, {"x": torch.zeros(1, width)}, optimizer=optimizer, regions={}, cuda=True)


@pytest.mark.parametrize("optimizer, per_weight", [("adamw_torch", 8), ("adamw_8bit", 2 + 8 / 256), ("sgd", 0)])
def test_optimizer_states_are_what_their_arithmetic_says(optimizer, per_weight):
    found = rehearsed(optimizer).at_peak.get(("optimizer", "shared"), 0)
    assert found == pytest.approx(per_weight * 512**2, abs=8)  # and a counter of steps


def test_paged_states_are_kept_apart():
    assert rehearsed("paged_adamw_8bit").paged == 512**2 * (2 + 8 / 256)
    assert rehearsed("paged_adamw_8bit", width=64).paged == 0  # so small a tensor is not paged
    assert rehearsed("adamw_8bit").paged == 0


@pytest.mark.parametrize(
    "name", [n for n in ARCHITECTURES if n not in {"PE-audio-video", "Qwen3-Omni thinker", "Gemma3n", "Gemma4"}]
)
def test_inputs_are_made_up_for_models_that_were_never_seen(name):
    with torch.device("meta"):
        model = ARCHITECTURES[name]()
    hollow(model)
    inputs = make_inputs(model, Sizes(frames=4, seconds=0.4, tokens=8, batch_size=2), features=tower(model))
    assert rehearse(model.train(), inputs, optimizer="sgd").peak > 0


# The allocator


def test_allocator_takes_segments_as_its_rules_say():
    assert reserved([]) == 0
    assert reserved([(1, 1)]) == 2 * MIB
    assert reserved([(1, 2 * MIB)]) == 20 * MIB
    assert reserved([(1, 11 * MIB)]) == 12 * MIB  # in steps of 2 MiB
    assert reserved([(1, 12 * MIB), (1, 0), (2, 6 * MIB), (3, 5 * MIB)]) == 12 * MIB  # what is left over is used
    assert reserved([(1, 12 * MIB), (1, 0), (2, 13 * MIB)]) == 26 * MIB  # and what is too small is not
    apart = [(n, 6 * MIB) for n in (1, 2, 3)] + [(1, 0), (2, 0), (4, 12 * MIB)]
    assert reserved(apart) == 20 * MIB  # neighbors become one


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40 * MIB), st.booleans()), max_size=40))
def test_allocator_takes_at_least_what_lives_and_nothing_new_in_the_second_round(sizes):
    events, living, most = [], {}, 0
    for number, (size, goes) in enumerate(sizes):
        events.append((number, size))
        living[number] = size
        most = max(most, sum(living.values()))
        if goes:
            first = next(iter(living))
            events.append((first, 0))
            del living[first]
    events += [(number, 0) for number in living]
    once = reserved(events)
    assert most <= once <= sum(size for size, _ in sizes) + 22 * MIB * len(sizes)
    assert reserved(events, repeats=3) == once  # all is free again, and whole


# The plan

SMALL = tf.SmolVLMConfig(
    vision_config={
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    },
    text_config={"model_type": "llama", **DECODER, "max_position_embeddings": 2048},
    image_token_id=250,
    scale_factor=2,
)


@settings(max_examples=8, deadline=None)
@given(
    st.sampled_from(["frames", "tokens", "batch_size", "rank", "accumulate"]),
    st.integers(1, 6),
    st.integers(1, 6),
    st.booleans(),
    st.sampled_from(["nf4", None]),
)
def test_more_of_anything_never_takes_less(name, few, more, checkpointing, quant_type):
    few, more = sorted((few, few + more))
    base = {"gpu": "T4", "frames": 2, "tokens": 16, "checkpointing": checkpointing, "quant_type": quant_type}
    less, much = plan(SMALL, **{**base, name: few}), plan(SMALL, **{**base, name: more})
    assert less.allocated <= much.allocated
    for found in (less, much):
        assert sum(found.parts.values()) == found.allocated == found.table()["all"].sum()
        assert found.allocated <= found.reserved < found.process


def test_checkpointing_and_fewer_bits_never_take_more():
    for frames in (1, 8):
        usual = plan(SMALL, gpu="T4", frames=frames)
        assert usual.changed(checkpointing=True).allocated <= usual.allocated
        assert usual.allocated <= usual.changed(quant_type=None).allocated
        assert usual.allocated <= usual.changed(dtype=torch.float32).allocated
        assert usual.allocated <= usual.changed(method="full", quant_type=None).allocated


def test_the_cheapest_change_that_fits_is_found_and_fits():
    wide = plan(SMALL, gpu=10**10, frames=16, batch_size=8, tokens=256)
    assert wide.fit() is wide
    tight = wide.changed(gpu=wide.process - MIB)
    assert not tight.fits
    found = tight.fit()
    assert found.fits
    assert found.process <= tight.limit
    table = tight.changes()
    assert 1 < len(table) <= len(CHANGES)
    first = table[table["fits"]].iloc[0]
    assert found.process == first["process"]
    least = plan(SMALL, gpu=1, frames=2)
    with pytest.raises(PlanError, match="nothing makes it fit; the least is"):
        least.fit()
    with pytest.raises(PlanError, match="no GPU was named"):
        plan(SMALL).fit()


def test_models_without_frames_and_bad_settings():
    text = plan(tf.LlamaConfig(**DECODER), tokens=64, frames=3)
    assert text.tokens == 64
    assert {region for _, region in text.parts} <= {"text", "shared"}
    assert plan(tf.LlamaConfig(**DECODER), tokens=64, frames=300).allocated == text.allocated
    for wrong, message in (
        ({"frames": 0}, "frames=0: expected a whole number from 1 on"),
        ({"frames": -4}, "frames=-4"),
        ({"batch_size": 1.5}, "batch_size=1.5"),
        ({"seconds": 0}, "seconds=0"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"gpu": "T5"}, "gpu='T5' is unknown; use one of T4"),
        ({"gpu": -1}, "gpu=-1: expected bytes"),
        ({"method": "full"}, "give quant_type=None"),
        ({"frozen": ("video",)}, "is no region"),
        ({"frozen": ("vision", "fusion", "text")}, "leaves nothing to adapt"),
        ({"optimizer": "adam"}, "optimizer='adam' is unknown"),
        ({"inputs": {"pixels": torch.zeros(1)}}, "can't be rehearsed with such inputs"),
    ):
        with pytest.raises(PlanError, match=message):
            plan(SMALL, **wrong)
    with pytest.raises(PlanError, match="no configuration of 'nobody/nothing'"):
        plan("nobody/nothing")
    with pytest.raises(PlanError, match="expected a model of transformers"):
        plan(nn.Linear(2, 2))


def test_frozen_towers_keep_no_activations():
    usual, frozen = plan(SMALL, frames=8), plan(SMALL, frames=8, frozen=("vision", "fusion"))
    assert frozen.parts.get(("activations", "vision"), 0) < usual.parts["activations", "vision"] / 4
    assert frozen.trained < usual.trained


def test_every_method_and_optimizer_can_be_planned():
    for method in mm.METHODS:
        quant_type = "nf4" if mm.METHODS[method].nf4 else None
        if method not in ("none", "prefix", "prompt", "p-tuning"):
            assert plan(SMALL, method, quant_type=quant_type).trained > 0
    with pytest.raises(PlanError, match="no parameter of the model requires a gradient"):
        plan(SMALL, "none")
    for optimizer in OPTIMIZERS:
        assert plan(SMALL, optimizer=optimizer).allocated > 0
    assert all(card.context < card.bytes for card in GPUS.values())


def test_command_line(capsys):
    assert main(["plan", "mmqlora/video", "--gpu", "T4", "--frames", "4"]) == 0
    said = capsys.readouterr().out
    assert "fits" in said and "activations" in said
    assert main(["plan", "mmqlora/video", "--gpu", "0.64e9", "--frames", "16", "--batch-size", "16"]) == 1
    assert "With " in capsys.readouterr().out
    assert main(["plan", "mmqlora/video", "--frames", "0"]) == 2
    assert "expected a whole number" in capsys.readouterr().err


@pytest.mark.parametrize(
    "operation, args, settings",
    [
        (torch.ops.aten.add.Tensor, ((4, 3, 5), (5,)), {"alpha": 2}),
        (torch.ops.aten.mul.Tensor, ((4, 3, 5), (4, 1, 5)), {}),
        (torch.ops.aten.mul.Tensor, ((5,), (4, 3, 5)), {}),
        (torch.ops.aten.mul.Tensor, ((4, 3, 5), 2.0), {}),
        (torch.ops.aten.mul.Tensor, ((4, 3, 5), 2j), {}),
        (torch.ops.aten.cat.default, ([(4, 3), (4, 2)], -1), {}),
        (torch.ops.aten._to_copy.default, ((4, 3, 5),), {"dtype": torch.bfloat16}),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_what_is_said_of_an_operation_is_what_it_gives(operation, args, settings, turned):
    def make(shape, device):
        if isinstance(shape, list):
            return [make(one, device) for one in shape]
        if not isinstance(shape, tuple):
            return shape
        made = torch.ones(shape, device=device)
        return made.transpose(0, 1).contiguous().transpose(0, 1) if turned and made.ndim > 1 else made

    real = operation(*(make(one, "cpu") for one in args), **settings)
    said = QUICK[operation](*(make(one, "meta") for one in args), **settings)
    assert (said.shape, said.stride(), said.dtype) == (real.shape, real.stride(), real.dtype)
