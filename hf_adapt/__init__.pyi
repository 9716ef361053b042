from hf_adapt.alignment import DANN as DANN
from hf_adapt.alignment import MMD as MMD
from hf_adapt.alignment import DomainAdversarialCallback as DomainAdversarialCallback
from hf_adapt.alignment import InformationMaximization as InformationMaximization
from hf_adapt.arguments import AdaptationArguments as AdaptationArguments
from hf_adapt.distillation import Distillation as Distillation
from hf_adapt.distillation import DistillationArguments as DistillationArguments
from hf_adapt.distillation import DistillationTrainer as DistillationTrainer
from hf_adapt.engine.adaptation import Adaptation as Adaptation
from hf_adapt.engine.adaptation import Objective as Objective
from hf_adapt.engine.callback import AdaptationCallback as AdaptationCallback
from hf_adapt.engine.callback import adapt as adapt
from hf_adapt.engine.streams import Stream as Stream
from hf_adapt.engine.trainer import AdaptationMixin as AdaptationMixin
from hf_adapt.engine.trainer import AdaptationTrainer as AdaptationTrainer
from hf_adapt.knowledge import KnowledgeCallback as KnowledgeCallback
from hf_adapt.unfreezing import GradualUnfreezingCallback as GradualUnfreezingCallback

__version__: str
