"""Temporal LoRA on every architecture in tiny configurations; `conformance.py` has what is checked."""

from __future__ import annotations

import pytest
from architectures import ARCHITECTURES
from conformance import NAMES, NOT_FOR_PEFT, PROPERTIES
from peft import LoraConfig, get_peft_model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("title", PROPERTIES)
@pytest.mark.parametrize("name", NAMES)
def test_architecture(name, title):
    PROPERTIES[title](name)


def test_enough_architectures():
    assert len(NAMES) >= 24


@pytest.mark.parametrize("name", NOT_FOR_PEFT)
def test_what_is_left_out_fails_with_plain_lora_as_well(name):
    with pytest.raises(NotImplementedError, match="get_input_embeddings"):
        get_peft_model(ARCHITECTURES[name](), LoraConfig(target_modules="all-linear"))
