"""An adapted model leaves the run: as open_clip, Hugging Face, ONNX or safetensors, or as its adapters alone."""

from adaptive_merge.export.adapter_file import load_adapters, save_adapters
from adaptive_merge.export.model import export_model
from adaptive_merge.export.module_file import load_module

__all__ = ["export_model", "load_adapters", "load_module", "save_adapters"]
