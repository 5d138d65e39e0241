"""What the verbs are given: frozen, checked once, with the papers' values as defaults. Nothing here needs torch."""

from clipfit.config.adapt import TUNINGS, AdaptConfig
from clipfit.config.evaluate import EvaluateConfig
from clipfit.config.options import settings
from clipfit.config.outputs import ExplainConfig, ExportConfig
from clipfit.config.parsing import parse_alphas, parse_numbers, parse_part
from clipfit.config.recipe import DEFAULT_TEMPLATE, Recipe
from clipfit.config.shared import PRECISIONS

__all__ = [
    "DEFAULT_TEMPLATE",
    "PRECISIONS",
    "TUNINGS",
    "AdaptConfig",
    "EvaluateConfig",
    "ExplainConfig",
    "ExportConfig",
    "Recipe",
    "parse_alphas",
    "parse_numbers",
    "parse_part",
    "settings",
]
