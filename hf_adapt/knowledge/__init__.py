"""Facts of a knowledge graph in any model: linking, entity vectors, injection."""

from hf_adapt.knowledge.graphs.graph import KnowledgeGraph
from hf_adapt.knowledge.injection.explanation import Explanation, explain
from hf_adapt.knowledge.injection.injection_layers import (
    CrossAttention,
    GatedAddition,
    InjectionLayer,
    KnowledgeAdapter,
    LayerSizes,
)
from hf_adapt.knowledge.injection.injector import KnowledgeInjector
from hf_adapt.knowledge.injection.knowledge_injection import KnowledgeInjection
from hf_adapt.knowledge.injection.objectives import (
    DescriptionAlignment,
    EntityPrediction,
    LinkPrediction,
)
from hf_adapt.knowledge.injection.saved_model import knowledge_inputs, load_knowledge_model
from hf_adapt.knowledge.injection.soft_prompt import SoftPrompt
from hf_adapt.knowledge.injection.text_triples import TextTriples
from hf_adapt.knowledge.injection.trainer import KnowledgeCallback, KnowledgeTrainer
from hf_adapt.knowledge.linking.callable_linker import CallableLinker
from hf_adapt.knowledge.linking.entity_linker import EntityLinker
from hf_adapt.knowledge.linking.inflection import ENGLISH_FUNCTION_WORDS
from hf_adapt.knowledge.linking.mentions import Candidate, Mention, TokenMention
from hf_adapt.knowledge.linking.token_alignment import TokenAligner
from hf_adapt.knowledge.vectors.table import EntityVectors

__all__ = [
    "ENGLISH_FUNCTION_WORDS",
    "CallableLinker",
    "Candidate",
    "CrossAttention",
    "DescriptionAlignment",
    "EntityLinker",
    "EntityPrediction",
    "EntityVectors",
    "Explanation",
    "GatedAddition",
    "InjectionLayer",
    "KnowledgeAdapter",
    "KnowledgeCallback",
    "KnowledgeGraph",
    "KnowledgeInjection",
    "KnowledgeInjector",
    "KnowledgeTrainer",
    "LayerSizes",
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
