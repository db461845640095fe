"""Models from public weights: towers, and whole checkpoints of ALBEF (section 3.1, 4.1).

Every tensor, of the file and of the result, is accounted for in an `ImportReport`; a missing or unexpected key is an
error that names it. `files` reads, `naming` and `albef_names` are the tables of names, `originals` and `towers` make
towers, `build` and `albef` models, `convert` writes them.
"""

from trips.importers.albef import load_albef
from trips.importers.build import build_model_from_towers
from trips.importers.convert import ImportResult, import_checkpoint
from trips.importers.files import read_tensors
from trips.importers.positions import resize_positions
from trips.importers.report import ImportReport
from trips.importers.towers import load_text_tower, load_vision_tower, read_config

__all__ = [
    "ImportReport",
    "ImportResult",
    "build_model_from_towers",
    "import_checkpoint",
    "load_albef",
    "load_text_tower",
    "load_vision_tower",
    "read_config",
    "read_tensors",
    "resize_positions",
]
