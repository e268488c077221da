"""The code behind the IVT course: boxes, scenes, the closed loop, SFT, GRPO, metrics and the report.

Importing it, or a module that needs no model, does not import torch.
"""

import os

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # before any library reads it

__version__ = "0.1.0"
