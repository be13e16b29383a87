"""One model in several processes: each holds a range of its layers, and one of them is asked.

Invariant: text, log probabilities and bits are those of one process, wherever the model is cut. A call goes
through the stages from the first to the last by way of the asking process (the driver), which alone knows
sequences and who owns which page; a stage knows its weights and its pages' numbers. cut.py says what a stage
holds, wire.py how messages travel, stage.py is a stage, model.py stands in the driver where a model stands,
load.py brings them together. Knows nothing of what starts processes: ray/ does. Imports what `loading` does.
"""

from tinyllm.pipeline.cut import Cut, balanced
from tinyllm.pipeline.load import Worker, load_stages
from tinyllm.pipeline.model import PipelineModel
from tinyllm.pipeline.stage import Spec, Stage

__all__ = ["Cut", "PipelineModel", "Spec", "Stage", "Worker", "balanced", "load_stages"]
