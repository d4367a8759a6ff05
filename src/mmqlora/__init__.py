"""Less is more: multimodal learning with QLoRA.

Example:
    >>> import mmqlora as mm
    >>> model, processor = mm.load("openai/whisper-tiny.en", quant_type="nf4")  # doctest: +SKIP
    >>> mm.regions(model)  # doctest: +SKIP
"""

from __future__ import annotations

# First, as it keeps bitsandbytes from warning about a kernel that nothing here needs.
from .quantization import (  # isort: skip
    LayerReport,
    QuantizationReport,
    close_cpu_traps,
    load,
    quantization_report,
    quantize,
)
from . import benchmark
from .answers import Accuracy, answer_accuracy, choice_accuracy, normalize_answer
from .calibration import Calibration, calibrate
from .captions import CaptionScores, caption_scores, caption_tokens
from .comparisons import compare
from .errors import (
    GateError,
    GridError,
    MediaError,
    MethodError,
    MetricError,
    MMQLoRAError,
    PlanError,
    QuantizationError,
    RankError,
    RecipeError,
    RecordError,
    RegionError,
    SelectionError,
    SignalError,
    TaskError,
    TimelineError,
    TrainingError,
)
from .evaluation import Evaluation, evaluate, predict
from .features import Features, mel_features, thumbnail_features
from .gates import TemporalLoraConfig, explain
from .grids import run_grid
from .ledger import Ledger
from .media import Audio, SkipBroken, Video, log_mel, read_audio, read_video, write_audio, write_video
from .memory import Memory, measure
from .methods import METHODS, adapt
from .metrics import ErrorRate, character_error_rate, english_normalizer, word_error_rate
from .noise import QuantizationNoise, encoder_features, quantization_noise
from .planner import GPUS, Plan, plan
from .ranks import Budget, Ranks, allocate_ranks
from .recipes import Recipe, plan_recipe, read_recipe, run_recipe
from .records import append_record, fingerprint, make_record, read_records
from .regions import Regions, regions
from .retrieval import RetrievalRanks, dual_softmax_ranks, retrieval_ranks
from .selection import SELECTORS, Noise, Selection, Selector, clip_noise, select_frames
from .signals import SIGNALS, Signals, audio_signals, pool_steps, signals, thumbnail_signals, video_signals
from .spans import Spans, select_segments
from .tasks import Captioning, Pairs, Recognition, Retrieval, Task
from .training import fine_tune

__version__ = "0.1.0"

__all__ = [
    "GPUS",
    "METHODS",
    "SELECTORS",
    "SIGNALS",
    "Accuracy",
    "Audio",
    "Budget",
    "Calibration",
    "CaptionScores",
    "Captioning",
    "ErrorRate",
    "Evaluation",
    "Features",
    "GateError",
    "GridError",
    "LayerReport",
    "Ledger",
    "MMQLoRAError",
    "MediaError",
    "Memory",
    "MethodError",
    "MetricError",
    "Noise",
    "Pairs",
    "Plan",
    "PlanError",
    "QuantizationError",
    "QuantizationNoise",
    "QuantizationReport",
    "RankError",
    "Ranks",
    "Recipe",
    "RecipeError",
    "Recognition",
    "RecordError",
    "RegionError",
    "Regions",
    "Retrieval",
    "RetrievalRanks",
    "Selection",
    "SelectionError",
    "Selector",
    "SignalError",
    "Signals",
    "SkipBroken",
    "Spans",
    "Task",
    "TaskError",
    "TemporalLoraConfig",
    "TimelineError",
    "TrainingError",
    "Video",
    "adapt",
    "allocate_ranks",
    "answer_accuracy",
    "append_record",
    "audio_signals",
    "benchmark",
    "calibrate",
    "caption_scores",
    "caption_tokens",
    "character_error_rate",
    "choice_accuracy",
    "clip_noise",
    "close_cpu_traps",
    "compare",
    "dual_softmax_ranks",
    "encoder_features",
    "english_normalizer",
    "evaluate",
    "explain",
    "fine_tune",
    "fingerprint",
    "load",
    "log_mel",
    "make_record",
    "measure",
    "mel_features",
    "normalize_answer",
    "plan",
    "plan_recipe",
    "pool_steps",
    "predict",
    "quantization_noise",
    "quantization_report",
    "quantize",
    "read_audio",
    "read_recipe",
    "read_records",
    "read_video",
    "regions",
    "retrieval_ranks",
    "run_grid",
    "run_recipe",
    "select_frames",
    "select_segments",
    "signals",
    "thumbnail_features",
    "thumbnail_signals",
    "video_signals",
    "word_error_rate",
    "write_audio",
    "write_video",
]
