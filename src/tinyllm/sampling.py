"""Where pickles of version 0.1.0 look for SamplingParams, which is in engine/sampling.py now."""

from tinyllm.engine.sampling import SamplingParams as SamplingParams
