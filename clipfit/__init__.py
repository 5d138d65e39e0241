"""clipfit: adapt CLIP to a handful of labelled images without making it worse at everything else.

    from clipfit import AdaptConfig, EvaluateConfig, adapt, evaluate, load
    result = adapt(AdaptConfig(shots=Path("my_shots"), method="cite", model="clipfit-tiny", pretrained=None))
    print(evaluate(EvaluateConfig(run=result.run)).as_json())
    print(load(result.run).predict("cat.jpg"))

The names below are the public API; they are loaded when first used, so that importing clipfit stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipfit.config import AdaptConfig, EvaluateConfig, ExplainConfig, ExportConfig, Recipe
    from clipfit.config.check import CheckConfig
    from clipfit.config.models import ModelsConfig
    from clipfit.config.plan import BenchmarkConfig
    from clipfit.config.predict import PredictConfig
    from clipfit.config.report import ReportConfig
    from clipfit.errors import ClipfitError, DataError, GuardError, ModelError, NonFiniteError, OutputError, UsageError
    from clipfit.methods.declared import adapt_config
    from clipfit.predictor import Prediction, Predictor, load
    from clipfit.verbs.adapt import AdaptResult, adapt
    from clipfit.verbs.benchmark import Benchmarked, benchmark
    from clipfit.verbs.check import Checked, check
    from clipfit.verbs.evaluate import Evaluation, evaluate
    from clipfit.verbs.explain import Explained, explain
    from clipfit.verbs.export import ExportResult, export
    from clipfit.verbs.models import ModelList, models
    from clipfit.verbs.predict import PredictResult, predict
    from clipfit.verbs.report import Reported, report_on

_HOME = {
    "adapt": "verbs.adapt", "AdaptResult": "verbs.adapt",
    "benchmark": "verbs.benchmark", "Benchmarked": "verbs.benchmark", "BenchmarkConfig": "config.plan",
    "check": "verbs.check", "Checked": "verbs.check", "CheckConfig": "config.check",
    "evaluate": "verbs.evaluate", "Evaluation": "verbs.evaluate",
    "explain": "verbs.explain", "Explained": "verbs.explain",
    "export": "verbs.export", "ExportResult": "verbs.export",
    "models": "verbs.models", "ModelList": "verbs.models", "ModelsConfig": "config.models",
    "predict": "verbs.predict", "PredictResult": "verbs.predict", "PredictConfig": "config.predict",
    "report_on": "verbs.report", "Reported": "verbs.report", "ReportConfig": "config.report",
    "load": "predictor", "Predictor": "predictor", "Prediction": "predictor",
    "AdaptConfig": "config", "EvaluateConfig": "config", "ExportConfig": "config",
    "ExplainConfig": "config", "Recipe": "config", "adapt_config": "methods.declared",
    "ClipfitError": "errors", "DataError": "errors", "GuardError": "errors", "ModelError": "errors",
    "NonFiniteError": "errors", "OutputError": "errors", "UsageError": "errors",
}  # fmt: skip

__all__ = [
    "AdaptConfig",
    "AdaptResult",
    "BenchmarkConfig",
    "Benchmarked",
    "CheckConfig",
    "Checked",
    "ClipfitError",
    "DataError",
    "EvaluateConfig",
    "Evaluation",
    "ExplainConfig",
    "Explained",
    "ExportConfig",
    "ExportResult",
    "GuardError",
    "ModelError",
    "ModelList",
    "ModelsConfig",
    "NonFiniteError",
    "OutputError",
    "PredictConfig",
    "PredictResult",
    "Prediction",
    "Predictor",
    "Recipe",
    "ReportConfig",
    "Reported",
    "UsageError",
    "adapt",
    "adapt_config",
    "benchmark",
    "check",
    "evaluate",
    "explain",
    "export",
    "load",
    "models",
    "predict",
    "report_on",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'clipfit' has no attribute {name!r}")
    return getattr(importlib.import_module(f"clipfit.{_HOME[name]}"), name)
