"""An adapted model leaves the run: as open_clip, Hugging Face, ONNX or safetensors, or as its adapters alone.

And its experts together, as one vector with a bit mask for each.
"""

from adaptive_merge.export.adapter_file import load_adapters, save_adapters
from adaptive_merge.export.model import export_model
from adaptive_merge.export.module_file import load_module
from adaptive_merge.export.tall import export_tall
from adaptive_merge.export.tall_file import TallMasks, load_tall

__all__ = ["TallMasks", "export_model", "export_tall", "load_adapters", "load_module", "load_tall", "save_adapters"]
