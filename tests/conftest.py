import os

# Before torch starts its threads: do not spin while waiting, other processes (engines under test) need the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
