"""What is wrong with an image: its label, its likeness to another, its picture."""

from smidgen.refine.detectors.ensemble import Ensemble, WrongLabels
from smidgen.refine.detectors.mislabeled import KernelQuality, LabelQuality
from smidgen.refine.detectors.noise import HiddenLabel
from smidgen.refine.detectors.outliers import Outliers
from smidgen.refine.detectors.votes import Votes

DETECTORS = {"label-quality": LabelQuality, "hidden-label": HiddenLabel, "kernel": KernelQuality, "votes": Votes, "outliers": Outliers}

__all__ = ["DETECTORS", "Ensemble", "HiddenLabel", "KernelQuality", "LabelQuality", "Outliers", "Votes", "WrongLabels"]
