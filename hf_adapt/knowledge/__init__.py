"""Facts of a knowledge graph in any model: linking, entity vectors, injection."""

from hf_adapt.knowledge.callable_linker import CallableLinker
from hf_adapt.knowledge.explaining import Explanation, explain
from hf_adapt.knowledge.forms import CrossAttention, Form, GatedAddition, KnowledgeAdapter
from hf_adapt.knowledge.graph import KnowledgeGraph
from hf_adapt.knowledge.injection import KnowledgeCallback, KnowledgeInjection, KnowledgeTrainer
from hf_adapt.knowledge.injector import KnowledgeInjector
from hf_adapt.knowledge.linker import EntityLinker
from hf_adapt.knowledge.linking import Mention
from hf_adapt.knowledge.objectives import (
    DescriptionAlignment,
    EntityPrediction,
    LinkPrediction,
)
from hf_adapt.knowledge.prompts import SoftPrompt
from hf_adapt.knowledge.saving import knowledge_inputs, load_knowledge_model
from hf_adapt.knowledge.surfaces import Candidate
from hf_adapt.knowledge.text_triples import TextTriples
from hf_adapt.knowledge.tokens import TokenAligner, TokenMention
from hf_adapt.knowledge.vectors import EntityVectors

__all__ = [
    "CallableLinker",
    "Candidate",
    "CrossAttention",
    "DescriptionAlignment",
    "EntityLinker",
    "EntityPrediction",
    "EntityVectors",
    "Explanation",
    "Form",
    "GatedAddition",
    "KnowledgeAdapter",
    "KnowledgeCallback",
    "KnowledgeGraph",
    "KnowledgeInjection",
    "KnowledgeInjector",
    "KnowledgeTrainer",
    "LinkPrediction",
    "Mention",
    "SoftPrompt",
    "TextTriples",
    "TokenAligner",
    "TokenMention",
    "explain",
    "knowledge_inputs",
    "load_knowledge_model",
]
