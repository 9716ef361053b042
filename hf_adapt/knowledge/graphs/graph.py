"""Knowledge graphs: entities with names and descriptions, and the triples among them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from hf_adapt.knowledge.graphs import networkx_graph, obo, rdf, wordnet
from hf_adapt.knowledge.graphs.builder import NameSource, build, pairs_of
from hf_adapt.knowledge.graphs.content import Content, Direction, Ids, Links, Neighbours
from hf_adapt.knowledge.graphs.triples import read_triples
from hf_adapt.storage.fingerprint import fingerprint
from hf_adapt.storage.folder import read_folder, write_folder

FORMAT = 2


class UnknownEntityError(KeyError):
    """Raised if no entity has a key."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would show it quoted


class KnowledgeGraph:
    """Entities with names and descriptions, and the triples among them, in arrays.

    Created by one of the `from_` methods. Entities and relations are numbered from 0. The arrays
    are memory-mapped after [`load`]: a million entities with names and five million triples take
    about 150 MB.

    Args:
        content: The arrays.

    Example:
        >>> graph = KnowledgeGraph.from_triples(
        ...     [("aspirin", "treats", "headache"), ("aspirin", "is_a", "drug")],
        ...     names={"aspirin": ["aspirin", "acetylsalicylic acid"]},
        ... )
        >>> graph
        KnowledgeGraph(3 entities, 2 relations, 2 triples)
        >>> relations, entities = graph.neighbours(graph.entity("aspirin"))
        >>> [(graph.relations[r], graph.label(e)) for r, e in zip(relations, entities)]
        [('treats', 'headache'), ('is_a', 'drug')]
    """

    def __init__(self, content: Content) -> None:
        self._content = content
        self._folder: Path | None = None
        self.relations: list[str] = content.relations.to_pylist()

    # ---- where it comes from ----

    @classmethod
    def from_triples(
        cls,
        triples: Any,
        *,
        head: str = "head",
        relation: str = "relation",
        tail: str = "tail",
        names: NameSource | None = None,
        descriptions: NameSource | None = None,
        separator: str | None = None,
    ) -> KnowledgeGraph:
        """Create it from a file, a table or a list of (head, relation, tail).

        Entities are numbered in the order in which rows first name them, relations likewise.
        White space around a text is cut off, and triples that are there twice count once. No text
        is taken for a missing value: the gene `NA` is an entity.

        Args:
            triples: The path of a csv, tsv (both also `.gz`) or parquet file, a
                `datasets.Dataset`, a pandas DataFrame (or another Arrow table), a mapping of
                columns, or any iterable of (head, relation, tail). A text file with exactly three
                columns needs no header.
            head: The column of heads.
            relation: The column of relations.
            tail: The column of tails.
            names: Of entities: a mapping from key to a name or a list of names, or a csv or tsv
                file of (entity, name). The first name is the label. Entities with a name and no
                triple are kept, without neighbours.
            descriptions: Of entities, one each: a mapping, or a file of (entity, description).
                Missing values (None, NaN) of a mapping are left out and counted in the log.
            separator: Between the cells of text files, if their ending does not say it.

        Raises:
            ValueError: If lines or rows are malformed or have missing cells (with their numbers),
                there is no triple, or a description is of an unknown entity or is there twice and
                differs.
        """
        content = build(
            read_triples(triples, (head, relation, tail), separator),
            pairs_of(names, "name", separator),
            pairs_of(descriptions, "description", separator),
            source=str(triples) if isinstance(triples, (str, Path)) else "triples",
        )
        return cls(content)

    @classmethod
    def from_rdf(
        cls,
        path: str | Path,
        *,
        format: str | None = None,
        label_predicates: Sequence[str] = rdf.LABELS,
        alias_predicates: Sequence[str] = rdf.ALIASES,
        description_predicates: Sequence[str] = rdf.DESCRIPTIONS,
        language: str | None = "en",
        malformed: rdf.Malformity = "error",
    ) -> KnowledgeGraph:
        """Create it from Turtle, N-Triples, RDF/XML or OWL, parsed by pyoxigraph.

        Keys are IRIs. RDF has no order, so entities and relations are numbered in the order of
        their IRIs. An OWL restriction (`A subClassOf [onProperty r; someValuesFrom B]`) becomes
        the triple (A, r, B). Other blank nodes, other literals, declarations such as
        `A rdf:type owl:Class`, and entities that are `owl:deprecated` are left out.

        Args:
            path: The file; `.gz` is decompressed.
            format: `"turtle"`, `"ntriples"` or `"xml"`; by the file's ending if it is None.
            label_predicates: IRIs of an entity's label; the first that is found counts.
            alias_predicates: IRIs of its other names; broad synonyms are not among them.
            description_predicates: IRIs of its description; the first that is found counts.
            language: Texts of this language, or of none, count; all texts if it is None.
            malformed: `"error"`, or `"skip"` to leave out statements that cannot be read, such as
                one with a bad IRI in a dump, and log their number. An open
                quotation costs one line in N-Triples; in Turtle and XML it is always an error.

        Raises:
            ImportError: If pyoxigraph is not installed.
            ValueError: If the file is malformed, or holds no triple between entities.
        """
        predicates = label_predicates, alias_predicates, description_predicates
        return cls(rdf.read(Path(path), format, predicates, language, malformed))

    @classmethod
    def from_obo(cls, path: str | Path) -> KnowledgeGraph:
        """Create it from an OBO file: terms, synonyms, definitions, `is_a` and `relationship`.

        Obsolete terms with the edges to them are left out, and so are broad synonyms, which mean
        more than their term. An alternative id (`alt_id`) stands for its term. An id that is no
        term of the file, as of another ontology, is kept with the id as its name; the log has the
        number of these. The tags of OBO 1.0 (`exact_synonym:` …) are read too.

        Args:
            path: The file; `.gz` is decompressed.

        Raises:
            ValueError: If lines are malformed, with their numbers.
        """
        return cls(obo.read(Path(path)))

    @classmethod
    def from_networkx(
        cls,
        graph: Any,
        *,
        relation: str = "relation",
        name: str = "name",
        description: str = "description",
    ) -> KnowledgeGraph:
        """Create it from a networkx graph, directed or not, with or without parallel edges.

        An edge of an undirected graph becomes one triple, from the node that was added first.
        Missing names and descriptions (None, NaN) are left out and counted in the log.

        Args:
            graph: Its nodes become keys by `str`; nodes without edges are kept.
            relation: The edge attribute that names the relation; an edge without it has its key
                in a multigraph if that is text, else `"related_to"`.
            name: The node attribute with a name or a list of names.
            description: The node attribute with the description.

        Raises:
            ValueError: If two nodes have the same text, a node or a relation is missing, or there
                is no edge.
        """
        return cls(networkx_graph.read(graph, relation, name, description))

    @classmethod
    def from_wordnet(cls, path: str | Path) -> KnowledgeGraph:
        """Create it from the files of WordNet 3.0 or 3.1: synsets, lemmas, glosses and pointers.

        Keys are such as `dog.n.02086723`: the first lemma, the part of speech (n, v, a, r) and the
        place in its file. Pointers between two words are kept between their synsets. The prior of
        a lemma's synset follows how often it was tagged with it, and then the order of its senses.

        Reference:
            Fellbaum 1998, "WordNet: An Electronic Lexical Database"; the file formats are those of
            its manual page wndb(5WN).

        Args:
            path: The folder with `data.noun`, `data.verb`, `data.adj` and `data.adv` (and
                `index.sense` or `index.noun` …, for the priors), or the folder that holds it.

        Raises:
            FileNotFoundError: If the files are not there.
            ValueError: If lines are malformed, with their numbers.
        """
        return cls(wordnet.read(Path(path)))

    # ---- what it holds ----

    @property
    def num_entities(self) -> int:
        """The number of entities, with or without triples."""
        return len(self._content.keys)

    @property
    def num_relations(self) -> int:
        """The number of relations, without their inverses."""
        return len(self.relations)

    @property
    def num_triples(self) -> int:
        """The number of triples, each counted once."""
        return len(self._content.triples)

    def __len__(self) -> int:
        return self.num_entities

    def __repr__(self) -> str:
        return (
            f"KnowledgeGraph({self.num_entities:,} entities, {self.num_relations:,} relations, "
            f"{self.num_triples:,} triples)"
        )

    @property
    def triples(self) -> npt.NDArray[np.int32]:
        """Head, relation, tail of each triple, in this order: (triples, 3) int32, read-only."""
        view = self._content.triples.view()
        view.flags.writeable = False
        return view

    def key(self, entity: int) -> str:
        """Return the unique name of an entity in its source."""
        return self._content.keys[self._checked(entity)]

    def entity(self, key: str) -> int:
        """Return the number of the entity with this key, or raise a KeyError with near keys."""
        entity = self._content.keys.find(key)
        if entity < 0:
            raise UnknownEntityError(
                f"No entity has the key {key!r}. {self._content.near(key)} Keys look like "
                f"{self.key(0)!r}; graph.surfaces() gives all the names."
            )
        return entity

    def entities(self, keys: Any) -> Ids:
        """Return the numbers of the entities with these keys, -1 for unknown keys."""
        return self._content.keys.find_all(keys)

    def _checked(self, entity: int) -> int:
        if not 0 <= entity < self.num_entities:
            raise IndexError(
                f"There is no entity {entity}: expected 0 to {self.num_entities - 1}. "
                "graph.entity(key) gives the number of a key."
            )
        return int(entity)

    def label(self, entity: int) -> str:
        """Return the entity's first name, else its key."""
        return self.names(entity)[0]

    def names(self, entity: int) -> list[str]:
        """Return the entity's names in texts, the label first; its key if it has none."""
        return self._content.names_of(self._checked(entity))

    def description(self, entity: int) -> str | None:
        """Return the entity's description, or None."""
        entity = self._checked(entity)
        descriptions = self._content.descriptions
        return None if descriptions is None else descriptions[entity].as_py() or None

    def surfaces(self) -> Iterator[tuple[str, int, float]]:
        """Iterate over (name, entity, prior): how likely a text means the entity by the name.

        An entity without names gives its key. The prior is 1 if the source does not know it.
        """
        return self._content.surfaces()

    # ---- what is linked to what ----

    @cached_property
    def _links(self) -> Links:
        return Links(self._content)

    def neighbours(
        self,
        entity: int,
        relation: str | int | None = None,
        direction: Direction = "both",
        limit: int | None = None,
    ) -> Neighbours:
        """Return what is linked to an entity, in a fixed order: outgoing edges first.

        Args:
            entity: Its number.
            relation: Only edges of this relation, by name or number; the number of an inverse
                asks for edges that come in.
            direction: `"out"` for triples of which the entity is the head, `"in"` for the tail.
            limit: The maximum number of neighbours.

        Raises:
            ValueError: If the relation or the direction is unknown.

        Example:
            >>> graph = KnowledgeGraph.from_triples([("a", "to", "b"), ("c", "to", "a")])
            >>> graph.neighbours(graph.entity("a"))
            Neighbours(relations=array([0, 1]), entities=array([1, 2]))
        """
        entity = self._checked(entity)
        if direction not in ("out", "in", "both"):
            raise ValueError(f"direction={direction!r}: expected 'out', 'in' or 'both'.")
        number = None if relation is None else self._relation(relation)
        return self._links.of(entity, number, direction, limit)

    def _relation(self, relation: str | int) -> int:
        if isinstance(relation, str):
            if relation in self.relations:
                return self.relations.index(relation)
            near = difflib.get_close_matches(relation, self.relations, n=5, cutoff=0.3)
            raise ValueError(
                f"No relation is called {relation!r}. Near: "
                f"{', '.join(map(repr, near or self.relations[:5]))}; graph.relations lists all."
            )
        if not 0 <= relation < 2 * self.num_relations:
            raise ValueError(
                f"There is no relation {relation}: expected 0 to {self.num_relations - 1}, or up "
                f"to {2 * self.num_relations - 1} for their inverses."
            )
        return int(relation)

    def subgraph(self, entities: Iterable[int | str], hops: int = 1) -> KnowledgeGraph:
        """Return the entities, given by number or key, and those up to some edges away.

        Edges count in either direction, and all triples among the entities are kept. Entities are
        renumbered in their order, and keep keys, names and descriptions; relations keep their
        numbers.
        """
        given = [self.entity(e) if isinstance(e, str) else self._checked(e) for e in entities]
        if not given:
            raise ValueError("subgraph() got no entities; expected at least one number or key.")
        return KnowledgeGraph(self._content.part(self._links.within(given, hops)))

    def statistics(self) -> dict[str, float]:
        """Return the numbers of entities, relations, triples, names and links."""
        content, degrees = self._content, self._links.degrees()
        described = 0
        if content.descriptions is not None:
            described = pc.sum(pc.not_equal(content.descriptions, "")).as_py()
        return {
            "entities": self.num_entities,
            "relations": self.num_relations,
            "triples": self.num_triples,
            "names": len(content.names.flatten()) if content.names is not None else 0,
            "described": described,
            "isolated": int(np.count_nonzero(degrees == 0)),
            "mean_degree": float(degrees.mean()) if len(degrees) else 0.0,
            "max_degree": int(degrees.max(initial=0)),
        }

    def describe(self) -> str:
        """Return the statistics and the most frequent relations as text."""
        counts = np.bincount(self._content.triples[:, 1], minlength=self.num_relations)
        lines = [f"{n.replace('_', ' '):>12}  {v:,.6g}" for n, v in self.statistics().items()]
        often = np.argsort(-counts, kind="stable")[:10]
        frequent = [f"{counts[r]:>12,}  {self.relations[r]}" for r in often]
        return "\n".join([*lines, "most frequent relations:", *frequent])

    # ---- on disk ----

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the whole content, the same on every machine and after saving.

        Two graphs with the same triples in another order number their entities differently: they
        differ, because vectors of one do not fit the other.
        """
        return fingerprint(self._content.arrays())

    def save(self, folder: str | Path) -> None:
        """Write the graph into a folder, created if missing, as files in the Arrow IPC format.

        An earlier graph stays valid until this one is complete; other files are left alone.
        """
        folder = Path(folder)
        if self._folder is not None and folder.resolve() == self._folder:
            return  # it was loaded from there
        about = {"fingerprint": self.fingerprint, "statistics": self.statistics()}
        write_folder(folder, "knowledge_graph", FORMAT, self._content.arrays(), about)

    @classmethod
    def load(cls, folder: str | Path, *, verify: bool = False) -> KnowledgeGraph:
        """Load a saved graph, memory-mapped: what is not used is not read.

        With `verify` everything is read and its hash compared.

        Raises:
            FileNotFoundError: If the folder holds no graph.
            ValueError: If it is damaged, or has another format.
        """
        made_by = "KnowledgeGraph.save(folder)"
        about, arrays = read_folder(folder, "knowledge_graph", FORMAT, made_by)
        if not {"keys", "relations", "triples"} <= set(arrays) or "fingerprint" not in about:
            raise ValueError(f"{folder} is damaged: its description is incomplete. Save again.")
        if verify and fingerprint(arrays) != about["fingerprint"]:
            raise ValueError(f"{folder} is damaged: its content has changed. Save the graph again.")
        graph = cls(Content.from_arrays(arrays))
        graph._folder = Path(folder).resolve()
        graph.__dict__["fingerprint"] = about["fingerprint"]
        return graph

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle a loaded graph as its folder, which is opened again, instead of its content."""
        if self._folder is not None:
            return _open_again, (str(self._folder), self.fingerprint)
        return KnowledgeGraph, (self._content,)


def _open_again(folder: str, fingerprint: str) -> KnowledgeGraph:
    graph = KnowledgeGraph.load(folder)
    if graph.fingerprint != fingerprint:
        raise ValueError(
            f"{folder} holds another graph (fingerprint {graph.fingerprint}) than when this one "
            f"({fingerprint}) was loaded from it. Save to another folder."
        )
    return graph
