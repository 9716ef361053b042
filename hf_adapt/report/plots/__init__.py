"""The plots of a report, from its numbers."""

from hf_adapt.report.plots.features import embedding_plots
from hf_adapt.report.plots.predictions import calibration_plot, confusion_plot, groups_plot
from hf_adapt.report.plots.target import accuracy_plot, shares_plot
from hf_adapt.report.plots.training import curve_plots, layers_plot

__all__ = [
    "accuracy_plot",
    "calibration_plot",
    "confusion_plot",
    "curve_plots",
    "embedding_plots",
    "groups_plot",
    "layers_plot",
    "shares_plot",
]
