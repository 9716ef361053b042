"""Sentences about findings with rare names, and what the Human Phenotype Ontology says of these.

`load_terms(tokenizer)` returns labelled sentences such as "Examination showed nephroptosis." and a
graph of the names and definitions. The label is the organ system of what the patient has (here the
genitourinary system), which is not in the graph: no organ system is, nor any edge that leads to
one. The sentences are made from patterns; names, definitions and systems are the ontology's.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from datasets import ClassLabel, Dataset, Features, Value
from domain_data import hpo_path
from transformers import PreTrainedTokenizerBase

from hf_adapt.knowledge import KnowledgeGraph

PATTERNS = (
    "The patient presented with {a}.",
    "Findings: {a}.",
    "Examination showed {a}.",
    "He was referred because of {a}.",
    "{a} was noted at the age of three.",
    "Follow-up for {a}.",
)
PATTERNS_OF_TWO = (  # {a} is what the patient has, {b} is not
    "No sign of {b}, but {a} was found.",
    "{a} was found; there was no {b}.",
    "The patient has {a}. His mother has {b}.",
    "While his sister suffers from {b}, he was seen for {a}.",
    "{b} was ruled out and {a} confirmed.",
    "{a} was confirmed and {b} ruled out.",
    "Referred with suspected {b}; the diagnosis is {a}.",
    "The diagnosis is {a}, not {b} as suspected.",
)
NUM_SYSTEMS = 10  # organ systems, those with the most terms
NUM_TEST, NUM_DEV = 260, 140  # terms


@dataclass(frozen=True)
class Term:
    """An entity of the ontology, a rare name of it, and its organ system."""

    entity: int
    name: str
    system: int


@dataclass(frozen=True)
class RareTerms:
    """Sentences with the columns text and label; no term of one split occurs in another."""

    graph: KnowledgeGraph
    train: Dataset
    dev: Dataset
    test: Dataset
    labels: list[str]


def load_terms(tokenizer: PreTrainedTokenizerBase, patterns: Sequence[str] = PATTERNS) -> RareTerms:
    """Sentences of terms that the tokenizer has no word for.

    A term is used if it has a definition, belongs to one organ system, and has a name of one word
    that the tokenizer breaks into three pieces or more.

    Args:
        tokenizer: The model's.
        patterns: Of sentences; in those of two findings the second is of another organ system.
    """
    ontology = KnowledgeGraph.from_obo(hpo_path())
    terms = []
    for entity, systems in sorted(organ_systems(ontology).items()):
        rare = [name for name in ontology.names(entity) if is_rare(name, tokenizer)]
        if rare and len(systems) == 1 and ontology.description(entity):
            terms.append(Term(entity, rare[0].lower(), next(iter(systems))))
    counts = Counter(term.system for term in terms)
    systems = [system for system, _ in counts.most_common(NUM_SYSTEMS)]
    terms = [term for term in terms if term.system in systems]
    random.Random(0).shuffle(terms)
    # Names and definitions of the terms alone: organ systems, and all between, are left out.
    graph = ontology.subgraph([term.entity for term in terms], hops=0)
    labels = [ontology.label(system).removeprefix("Abnormality of ") for system in systems]
    test, dev = terms[:NUM_TEST], terms[NUM_TEST : NUM_TEST + NUM_DEV]
    return RareTerms(
        graph,
        sentences(terms[NUM_TEST + NUM_DEV :], systems, labels, patterns, copies=1),
        sentences(dev, systems, labels, patterns, copies=2),
        sentences(test, systems, labels, patterns, copies=2),
        labels,
    )


def is_rare(name: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a name is one word, no abbreviation, of three pieces or more."""
    return " " not in name and not name.isupper() and len(tokenizer.tokenize(name)) >= 3


def organ_systems(ontology: KnowledgeGraph) -> dict[int, set[int]]:
    """The children of "Phenotypic abnormality" that each term below them descends from."""

    def children(entity: int) -> list[int]:
        return ontology.neighbours(entity, "is_a", "in").entities.tolist()

    found: dict[int, set[int]] = {}
    for system in children(ontology.entity("HP:0000118")):
        todo = children(system)
        while todo:
            entity = todo.pop()
            if system not in found.setdefault(entity, set()):
                found[entity].add(system)
                todo.extend(children(entity))
    return found


def sentences(
    terms: list[Term], systems: list[int], labels: list[str], patterns: Sequence[str], copies: int
) -> Dataset:
    """Some sentences of each term."""
    draw = random.Random(1)
    texts, classes = [], []
    for term in terms * copies:
        other = draw.choice([each for each in terms if each.system != term.system])
        text = draw.choice(patterns).format(a=term.name, b=other.name)
        texts.append(text[0].upper() + text[1:])
        classes.append(systems.index(term.system))
    features = Features({"text": Value("string"), "label": ClassLabel(names=labels)})
    return Dataset.from_dict({"text": texts, "label": classes}, features=features)
