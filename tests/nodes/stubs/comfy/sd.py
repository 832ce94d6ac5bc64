"""Two of the families, of which one has the same name as one of ours."""

import enum


class CLIPType(enum.Enum):
    STABLE_DIFFUSION = 1
    FLUX = 2
