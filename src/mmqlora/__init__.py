"""Less is more: multimodal learning with QLoRA.

Example:
    >>> import mmqlora as mm
    >>> model, processor = mm.load("openai/whisper-tiny.en", quant_type="nf4")  # doctest: +SKIP
    >>> mm.regions(model)  # doctest: +SKIP
"""

from __future__ import annotations

from .errors import MediaError, MMQLoRAError, QuantizationError, RecordError, RegionError, TrainingError

__version__ = "0.1.0"

__all__ = [
    "MMQLoRAError",
    "MediaError",
    "QuantizationError",
    "RecordError",
    "RegionError",
    "TrainingError",
]
