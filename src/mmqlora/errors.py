"""The errors that mmqlora raises.

Every one of them is a `MMQLoRAError`, so one ``except`` catches what this library objects to and nothing else.
A message says what was given, what was expected, and what would fit.
"""

from __future__ import annotations


class MMQLoRAError(Exception):
    """Anything that mmqlora objects to.

    Example:
        >>> import mmqlora as mm
        >>> try:
        ...     mm.read_audio("no-such-file.wav")
        ... except mm.MMQLoRAError as error:
        ...     print(type(error).__name__)
        MediaError
    """


class MediaError(MMQLoRAError):
    """A video or audio file that is missing, damaged, empty, or that a decoder could not read in time."""


class SignalError(MMQLoRAError):
    """A signal that is unknown or that a modality does not have, or frames and spectrograms that can't give one."""


class RegionError(MMQLoRAError):
    """A module that belongs to no known region, or a pattern that matches nothing."""


class QuantizationError(MMQLoRAError):
    """A model that can't be found, loaded or quantized as asked."""


class MethodError(MMQLoRAError):
    """A fine-tuning method that is unknown, or that does not fit a model, its bits or its settings."""


class TrainingError(MMQLoRAError):
    """A run that can't start or had to stop, such as one whose loss is no longer finite."""


class RecordError(MMQLoRAError):
    """A run record that is damaged, incomplete or missing, or that can't be compared with others."""


class GridError(MMQLoRAError):
    """A grid of runs that can't start, such as one whose function a new process can't import."""


class TimelineError(MMQLoRAError):
    """A model whose time is not known, or rows that have no place in it."""


class GateError(MMQLoRAError):
    """Gates that can't be made as asked, or something that adapters with open gates can't do."""


class RankError(MMQLoRAError):
    """A budget or a calibration that ranks can't be allocated by, or a pattern that matches no Linear."""


class PlanError(MMQLoRAError):
    """A plan of memory that can't be made, such as one for negative frames or a model whose inputs are not known."""


class SelectionError(MMQLoRAError):
    """Features, noise or a budget that frames and segments can't be selected by, or a method that is unknown."""


class MetricError(MMQLoRAError):
    """References, predictions or similarities that can't be scored, such as an item that nothing is right for."""


class TaskError(MMQLoRAError):
    """A task that does not fit a model or its processor, or predictions that are not of this model and data."""


class RecipeError(MMQLoRAError):
    """A recipe that can't be read, or that says something that nobody asks for."""
