"""skada's methods and the idea of the recommended recipe on the same frozen features.

The rows are those of `domain_shift.py` with `configs/vader4.yaml`: 480 labelled source texts, 480
target texts without labels, at most 500 test texts, all 12 pairs. A text is the mean over its
tokens of all-MiniLM-L6-v2's last hidden states, of norm 1, without the dimensions that are constant
over a pair, and not standardised (cross-validation on source rows is no better then). The
classifier is scikit-learn's LogisticRegression, whose C each method chooses from 0.001 to 1,000 by
unweighted 5-fold cross-validation on the rows and labels that the method gives it. DASVM and JDOT,
which fit many times, take the C of source only. skada's methods have their defaults. Not among
them, for their time: MultiLinearMongeAlignment and MMDLSConSMapping (over 60 and 11 seconds a
pair). A dash: the method ended with an error, which is printed; its mean is left out.

The last rows of the table are hf_adapt's functions on the same features: prior correction of source
only, and class-balanced pseudo-labels in two rounds (shares 0.4 and 0.8). *Frequencies given* means
counted on the target's training rows; no target label is used for anything else but the bound and
scoring. Nothing is random but KLIEP, which gets seed 0, so there are no seeds to repeat.

    pip install skada==0.6.0
    python benchmarks/domain_shift_peer.py [--pair movies:tweets] [--output FILE]

Six minutes on one core. Results: docs/results.md.
"""

import argparse
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from frozen_features import FrozenPair, frozen_pairs
from measure import print_machine, progress
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score

from hf_adapt.alignment.priors import corrected_logits
from hf_adapt.alignment.self_training import balanced_pseudo_labels
from hf_adapt.experiments.tables import markdown
from hf_adapt.storage.text_file import write_text

try:
    import skada
except ImportError:
    raise SystemExit("error: skada is not installed: pip install skada==0.6.0") from None

PLAIN = [  # they move source rows, or both domains
    *("CORAL", "LinearOTMapping", "OTMapping", "EntropicOTMapping", "ClassRegularizerOTMapping"),
    *("SubspaceAlignment", "TransferComponentAnalysis", "TransferJointMatching"),
    "TransferSubspaceLearning",
]
WEIGHTED = [  # they weight source rows, or label target rows
    *("DensityReweight", "GaussianReweight", "DiscriminatorReweight", "KLIEPReweight"),
    *("NearestNeighborReweight", "KMMReweight", "MMDTarSReweight", "OTLabelProp", "JCPOTLabelProp"),
]
SOURCE_ONLY, BOUND = "source only", "bound"


class Classifier(LogisticRegression):
    """LogisticRegression that chooses its C on the rows it is given."""

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "Classifier":
        def score(c: float) -> float:
            model = LogisticRegression(C=c, max_iter=1000)
            return float(cross_val_score(model, X, y, cv=5).mean())

        self.set_params(C=max(10.0 ** np.arange(-3, 4), key=score), max_iter=1000)
        return super().fit(X, y, sample_weight)


def skada_methods(c: float) -> dict[str, Any]:
    """The estimators, by their names."""
    weighted = Classifier().set_fit_request(sample_weight=True)
    methods = {name: getattr(skada, name)(Classifier()) for name in PLAIN}
    for name in WEIGHTED:
        seed = {"random_state": 0} if name == "KLIEPReweight" else {}
        methods[name] = getattr(skada, name)(weighted, **seed)
    methods["OTLabelProp, n_iter_max=1,000,000"] = skada.OTLabelProp(weighted, n_iter_max=1_000_000)
    plain = LogisticRegression(C=c, max_iter=1000)
    methods["JDOTClassifier"] = skada.JDOTClassifier(plain)
    methods["DASVMClassifier"] = skada.make_da_pipeline(skada.DASVMClassifier(plain))
    return methods


def self_trained(model: Any, source: Any, labels: Any, target: Any, priors: Any) -> Any:
    """Fit twice on source rows and target rows with class-balanced pseudo-labels."""
    for share in (0.4, 0.8):
        p = torch.from_numpy(model.predict_proba(target))
        # Where nothing is known of the frequencies: half predicted, half uniform, as SelfTraining.
        used = (p.mean(0) + 1 / p.shape[1]) / 2 if priors is None else priors
        guesses, kept = (each.numpy() for each in balanced_pseudo_labels(p, used, share))
        rows = np.concatenate([source, target[kept]])
        model = Classifier().fit(rows, np.concatenate([labels, guesses[kept]]))
    return model


def accuracies(pair: FrozenPair) -> Any:
    """The test accuracy of each method in per cent."""
    source, labels, target, test = pair.source, pair.labels, pair.target, pair.test
    truth, own = pair.truth, pair.target_labels
    model = Classifier().fit(source, labels)
    found: dict[str, Any] = {SOURCE_ONLY: model.predict(test)}
    rows = np.concatenate([source, target])
    given = np.concatenate([labels, np.full(len(target), -1)])
    domains = np.repeat([1, -2], [len(source), len(target)])
    for name, method in skada_methods(model.C).items():
        try:
            method.fit(rows, given, sample_domain=domains)
            found[f"skada {name}"] = method.predict(test, sample_domain=np.full(len(test), -2))
        except (ValueError, np.linalg.LinAlgError) as error:
            found[f"skada {name}"] = None  # a dash in the table
            progress({"method": name, "error": " ".join(str(error).split())[:300]})
    here, there = (torch.from_numpy(np.bincount(y) / len(y)) for y in (labels, own))
    logits = torch.from_numpy(model.predict_log_proba(test))
    corrected = corrected_logits(logits, here, there).argmax(1).numpy()
    found["prior correction, frequencies given"] = corrected
    for name, priors in (("not given", None), ("given", there)):
        trained = self_trained(model, source, labels, target, priors)
        found[f"balanced pseudo-labels, frequencies {name}"] = trained.predict(test)
    found[BOUND] = Classifier().fit(target, own).predict(test)
    return {
        name: None if guess is None else 100 * float(np.mean(guess == truth))
        for name, guess in found.items()
    }


def table(pairs: dict[str, dict[str, Any]]) -> str:
    """A line for each method; shares of the gap closed are means over pairs of 10 or more."""
    wide = [p for p in pairs.values() if p[BOUND] - p[SOURCE_ONLY] >= 10]
    closed = f"closed, {len(wide)} pairs of gap ≥ 10"
    cells = [["method", "mean", "pairs > 1 point below", closed, *pairs]]
    for name in next(iter(pairs.values())):
        values = [found[name] for found in pairs.values()]
        line = ["–", "–", "–"]
        if None not in values:  # a mean over some pairs does not compare
            below = sum(round(p[SOURCE_ONLY] - p[name], 6) > 1 for p in pairs.values())
            gains = [(p[name] - p[SOURCE_ONLY]) / (p[BOUND] - p[SOURCE_ONLY]) for p in wide]
            share = f"{np.mean(gains):.0%}" if gains else "–"
            line = [f"{np.mean(values):.1f}", str(below), share]
        shown = ["–" if value is None else f"{value:.1f}" for value in values]
        cells.append([name, *line, *shown])
    return markdown(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pair", action="append", help="SOURCE:TARGET; all 12 if not given")
    parser.add_argument("--output", type=Path, help="a file for the table")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # skada's methods warn by the hundred
    torch.set_num_threads(1)
    print_machine("cpu", "skada", "scikit-learn", "POT", "torch", "transformers")
    results = {}
    for pair in frozen_pairs(options.pair):
        results[pair.name] = accuracies(pair)
        progress({"pair": pair.name, "dimensions": pair.source.shape[1]})
    text = table(results)
    print(f"\n{text}")
    if options.output:
        write_text(options.output, f"{text}\n")


if __name__ == "__main__":
    main()
