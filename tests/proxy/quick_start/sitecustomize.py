"""Python imports this first, where PYTHONPATH names this folder.

A proxy is three processes, each of which imports LiteLLM: a third of that time goes into looking
for garbage, in which is none.
"""

import gc

gc.set_threshold(20_000, 20, 20)
