"""The code behind the IVT course: boxes, scenes, the closed loop, SFT, GRPO, metrics and the report.

Importing it, or a module that needs no model, does not import torch.
"""

__version__ = "0.1.0"
