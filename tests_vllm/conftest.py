"""The environment that vLLM starts in: quiet, offline, small, and leaving nothing behind.

It has to stand before vLLM is imported, here and in the processes that inherit it.
"""

import os
import tempfile

_CACHE = tempfile.TemporaryDirectory(prefix="moesteer-vllm-")

os.environ |= {
    # One core, and no look at the network
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # The engine's core lives in this process, where a test can look into it.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # What an earlier run compiled must not answer for this one.
    "VLLM_CACHE_ROOT": _CACHE.name,
    # The CPU kernels of latent attention know DeepSeek's own sizes only; the long way knows others.
    "VLLM_MLA_DISABLE": "1",
}
# Overrules what an engine is told about its cache, and cannot be less than 1 GiB.
os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
