"""A ComfyUI node for the tests: what this process holds on its device, as JSON."""

import json

import torch
from comfy import model_management


class Holdings:
    CATEGORY = "tests"
    FUNCTION = "look"
    INPUT_TYPES = classmethod(lambda cls: {"required": {"after": ("IMAGE",)}})
    OUTPUT_NODE = True
    RETURN_TYPES = ()
    IS_CHANGED = classmethod(lambda cls, **_: float("nan"))

    def look(self, after):
        models = {
            type(loaded.model.model).__name__: loaded.model.loaded_size()
            for loaded in model_management.current_loaded_models
        }
        allocated = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        return {"ui": {"text": (json.dumps({"models": models, "allocated": allocated}),)}}


NODE_CLASS_MAPPINGS = {"LunaTestHoldings": Holdings}
