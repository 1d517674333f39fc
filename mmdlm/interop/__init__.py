"""Other libraries and published families: their pieces in our house, and ours in theirs."""

from mmdlm.interop.diffusers_pipelines import BlockCausalModel, PolicyScheduler
from mmdlm.interop.diffusers_schedulers import SchedulerPolicy, UniformSchedulerPolicy

__all__ = ["BlockCausalModel", "PolicyScheduler", "SchedulerPolicy", "UniformSchedulerPolicy"]
