class ModelPatcher:
    pass
