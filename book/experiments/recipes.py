"""What memory each recipe will take, and the smallest card that it fits; chapter *Going to real scale*.

    cd book && python -m experiments.recipes

Only configurations are needed. Those of the models' pages are written down here, so that no network is needed either;
`mmqlora.plan_recipe` without ``config`` reads them by the models' names.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import transformers as tf
from tqdm import tqdm

from mmqlora import GPUS, plan_recipe, read_recipe
from mmqlora.recipes import RECIPES
from mmqlora.records import append_record, fingerprint, make_record

RECORDS = Path(__file__).parent.parent / "records" / "recipes.jsonl"

CONFIGS: dict[str, Callable[[], Any]] = {
    "openai/whisper-small.en": partial(
        tf.WhisperConfig,
        d_model=768,
        encoder_layers=12,
        decoder_layers=12,
        encoder_attention_heads=12,
        decoder_attention_heads=12,
        encoder_ffn_dim=3072,
        decoder_ffn_dim=3072,
        vocab_size=51864,
        architectures=["WhisperForConditionalGeneration"],
    ),
    "Qwen/Qwen2-Audio-7B-Instruct": partial(
        tf.Qwen2AudioConfig,
        audio_config={"model_type": "qwen2_audio_encoder", "num_mel_bins": 128, "max_source_positions": 1500},
        text_config={"model_type": "qwen2", "intermediate_size": 11008, "vocab_size": 156032},
        architectures=["Qwen2AudioForConditionalGeneration"],
    ),
    "laion/clap-htsat-unfused": partial(tf.ClapConfig, architectures=["ClapModel"]),
    "openai/clip-vit-base-patch32": partial(tf.CLIPConfig, architectures=["CLIPModel"]),
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": partial(
        tf.SmolVLMConfig,
        vision_config={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 512,
            "patch_size": 16,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": 960,
            "intermediate_size": 2560,
            "num_hidden_layers": 32,
            "num_attention_heads": 15,
            "num_key_value_heads": 5,
            "vocab_size": 49280,
            "max_position_embeddings": 8192,
        },
        scale_factor=4,
        image_token_id=49190,
        architectures=["SmolVLMForConditionalGeneration"],
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": partial(
        tf.Qwen2_5_VLConfig,
        vision_config={"hidden_size": 1280, "out_hidden_size": 3584},
        text_config={
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        architectures=["Qwen2_5_VLForConditionalGeneration"],
    ),
}


def foretell(name: str) -> dict[str, Any]:
    """The record of a recipe."""
    recipe = read_recipe(name)
    model_config = CONFIGS[recipe.model["name_or_path"]]()
    cards = {}
    for card in GPUS:  # from the smallest on
        found = plan_recipe(recipe, card, model_config)
        cards[card] = {"process": found.process, "fits": found.fits}
        if found.fits:
            break
    regions: dict[str, int] = {}
    for (_, region), size in found.parts.items():
        regions[region] = regions.get(region, 0) + size
    measured = {
        "title": recipe.title,
        "published": recipe.published,
        "cards": cards,
        "fits": next((card for card, what in cards.items() if what["fits"]), None),
        "allocated": found.allocated,
        "process": found.process,
        "regions": regions,
        "trained": found.trained,
        "model": recipe.model["name_or_path"],
        "data_set": recipe.data["name"],
        "task": recipe.task["name"],
    }
    return make_record("recipes", {"recipe": name}, 0, data=fingerprint(RECIPES[name]), measured=measured)


def main() -> None:
    """Plan and record every recipe."""
    warnings.simplefilter("ignore")
    RECORDS.unlink(missing_ok=True)
    for name in tqdm(RECIPES, desc="plan"):
        append_record(RECORDS, foretell(name))


if __name__ == "__main__":
    main()
