"""Set before torch and matplotlib are imported: tiny tensors gain nothing from threads, and tests have no screen."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
